"""ExpertChoice: every expert takes exactly its share of every sequence, its best tokens, never padding."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing import ExpertChoice, MaskRatio, Router, Rows, Share, Sigmoid, Tokens, Weigh
from routing.mask_ratio import Constant
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
Within = Literal["sequence", "batch"]


class Case(NamedTuple):
    priced_TE: Tensor
    top_k: int
    tokens: Tokens
    select: ExpertChoice

    @property
    def k_B(self) -> list[int]:
        k = self.select.share(self.top_k, self.tokens)
        return k.tolist() if isinstance(k, Tensor) else [k] * (len(self.priced_TE) // self.tokens.length)

    def rows(self, priced_TE: Tensor, tokens: Tokens) -> Rows:
        return self.select(priced_TE, torch.zeros(priced_TE.shape[1]), self.top_k, tokens)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores without ties; sequences padded to nothing; k up to E."""
    sequences, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = sequences * length * num_experts
    priced_TE = (torch.randperm(size, generator=generator) - size / 2).view(-1, num_experts) / 7
    valid_T = (
        torch.rand(sequences * length, generator=generator) < draw(st.floats(0, 1)) if draw(st.booleans()) else None
    )
    share: Share = Constant()
    if draw(st.booleans()):
        share = MaskRatio(least=draw(st.integers(1, top_k)), most=draw(st.integers(top_k, num_experts)))
    tokens = Tokens(valid_T, length, torch.rand(sequences, generator=generator))
    within: Within = draw(st.sampled_from(["sequence", "batch"]))
    return Case(priced_TE, top_k, tokens, ExpertChoice(within=within, share=share))


def picks(rows: Rows) -> set[tuple[int, int]]:
    """(token, expert) of all rows that go somewhere, each of which there is once."""
    pairs = [(t, e) for t, e in zip(rows.token_N.tolist(), rows.expert_N.tolist()) if e >= 0]
    assert len(set(pairs)) == len(pairs), "an expert takes a token twice"
    return set(pairs)


def by_sorting(case: Case) -> set[tuple[int, int]]:
    """The definition, in plain Python."""
    length, num_experts = case.tokens.length, case.priced_TE.shape[1]
    valid_T = [True] * len(case.priced_TE) if case.tokens.valid_T is None else case.tokens.valid_T.tolist()
    spans = [range(start, start + length) for start in range(0, len(valid_T), length)]
    pools = [[t for t in span if valid_T[t]] for span in spans]
    budgets = [len(pool) * k for pool, k in zip(pools, case.k_B)]
    if case.select.within == "batch":
        pools, budgets = [[t for pool in pools for t in pool]], [sum(budgets)]
    found = set()
    for pool, budget in zip(pools, budgets):
        take = max(1, budget // num_experts)
        for expert in range(num_experts):
            found |= {(t, expert) for t in sorted(pool, key=lambda t: -case.priced_TE[t, expert].item())[:take]}
    return found


@LAW
@given(cases())
def test_each_expert_takes_its_best_tokens_and_never_padding(case: Case) -> None:
    before = case.priced_TE.clone()
    rows = case.rows(case.priced_TE, case.tokens)
    assert picks(rows) == by_sorting(case)
    assert rows.top_k is None
    assert rows.token_N.dtype == rows.expert_N.dtype == torch.int64
    assert torch.equal(case.priced_TE, before), "the selector wrote into the scores"


@LAW
@given(cases(), st.integers(0, 2**16))
def test_the_number_of_rows_depends_on_shapes_alone(case: Case, seed: int) -> None:
    """So the host knows it without asking the device."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, sequences = len(case.priced_TE), len(case.k_B)
    other = Tokens(
        torch.rand(num_tokens, generator=generator) < 0.5,
        case.tokens.length,
        torch.rand(sequences, generator=generator),
    )
    rows = case.rows(case.priced_TE, case.tokens)
    assert len(case.rows(case.priced_TE.flip(0), other).token_N) == len(rows.token_N)


@pytest.mark.parametrize("share", [Constant(), MaskRatio(least=8, most=32)], ids=["constant", "mask ratio"])
def test_column_sums_are_exactly_the_share_of_the_sequence(share: Share) -> None:
    """Sequences of 100 tokens, 64 experts, k = 32, 26, 20, 8 (20 if constant)."""
    torch.manual_seed(0)
    router = Router(16, 64, 20, select=ExpertChoice(share=share))
    choice = router(torch.randn(400, 16), length=100, ratio_B=torch.tensor([0.0, 0.25, 0.5, 1.0]))
    of_sequence = choice.token_N.div(100, rounding_mode="floor")
    for sequence, k in enumerate([20] * 4 if share == Constant() else [32, 26, 20, 8]):
        expert_N = choice.expert_N[(of_sequence == sequence) & (choice.expert_N >= 0)]
        assert torch.bincount(expert_N, minlength=64).tolist() == [100 * k // 64] * 64
    assert torch.equal(choice.load_E, choice.wanted_E)


def test_a_sequence_too_short_for_its_share_gives_every_expert_one_token() -> None:
    rows = ExpertChoice()(torch.randn(6, 8), torch.zeros(8), 2, Tokens(None, 3))
    assert len(picks(rows)) == 2 * 8


def test_a_sequence_of_padding_gives_nothing_to_nobody() -> None:
    valid_T = torch.tensor([True, True, True, False, False, False])
    rows = ExpertChoice()(torch.randn(6, 4), torch.zeros(4), 2, Tokens(valid_T, 3))
    assert {token for token, _ in picks(rows)} <= {0, 1, 2}
    assert not picks(ExpertChoice()(torch.randn(6, 4), torch.zeros(4), 2, Tokens(torch.zeros(6, dtype=torch.bool), 3)))
    assert len(ExpertChoice()(torch.randn(0, 4), torch.zeros(4), 2, Tokens(None, 0)).token_N) == 0


def test_prices_change_no_pick() -> None:
    torch.manual_seed(0)
    router, x_TD = Router(8, 6, 2, select=ExpertChoice(), dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    before = router(x_TD)
    router.price_E.copy_(torch.randn(6))
    assert torch.equal(router(x_TD).expert_N, before.expert_N)
    assert torch.equal(router(x_TD).token_N, before.token_N)


def test_normalized_softmax_weights_are_the_softmax_over_the_experts_that_took_the_token() -> None:
    torch.manual_seed(0)
    router = Router(8, 16, 4, select=ExpertChoice(), weigh=Weigh(normalize=True), dtype=torch.float64)
    x_TD = torch.randn(40, 8, dtype=torch.float64)
    choice = router(x_TD, length=10)
    direction_TE = torch.randn(40, 16, dtype=torch.float64)
    (choice.weight_N * direction_TE[choice.token_N, choice.expert_N]).sum().backward()
    grad, router.weight.grad = router.weight.grad, None

    taken_TE = torch.zeros(40, 16, dtype=torch.bool)
    taken_TE[choice.token_N, choice.expert_N] = True
    assert len(set(taken_TE.sum(dim=1).tolist())) > 3, "tokens are taken by any number of experts"
    logit_TE = (x_TD @ router.weight.T).masked_fill(~taken_TE, float("-inf"))
    weight_TE = logit_TE.softmax(dim=-1).where(taken_TE, 0.0)  # no NaN of a token that nobody took
    torch.testing.assert_close(choice.weight_N, weight_TE[choice.token_N, choice.expert_N], rtol=1e-10, atol=1e-14)
    some_TE = logit_TE[taken_TE.any(dim=1)].softmax(dim=-1)
    (some_TE * direction_TE[taken_TE.any(dim=1)]).sum().backward()
    torch.testing.assert_close(grad, router.weight.grad, rtol=1e-9, atol=1e-12)


def test_where_every_expert_takes_every_token_the_weights_are_those_of_token_choice() -> None:
    torch.manual_seed(0)
    chooses = Router(8, 6, 6, score=Sigmoid(), select=ExpertChoice())
    chosen = Router(8, 6, 6, score=Sigmoid())
    chosen.load_state_dict(chooses.state_dict())
    x_TD = torch.randn(12, 8)
    tables = []
    for router in (chooses, chosen):
        choice = router(x_TD, length=4)
        tables.append(torch.zeros(12, 6).index_put((choice.token_N, choice.expert_N), choice.weight_N))
    assert torch.equal(*tables)


def test_an_unknown_range_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="within a 'token'"):
        ExpertChoice(within="token")  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [0, 9])
def test_a_k_that_cannot_be_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k} of 8 experts"):
        Router(4, 8, top_k, select=ExpertChoice())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"length": 5}, "12 tokens are no whole sequences of length=5"),
        ({"length": 0}, "12 tokens are no whole sequences of length=0"),
        ({"length": 4, "ratio_B": torch.rand(4)}, r"ratio_B must be floating point and \[3\].*\[4\]"),
        ({"length": 4, "ratio_B": torch.ones(3, dtype=torch.int64)}, "got torch.int64"),
        ({"valid_T": torch.ones(11, dtype=torch.bool)}, r"valid_T must be bool and \[12\]; got torch.bool and \[11\]"),
        ({"valid_T": torch.ones(12)}, "got torch.float32"),
    ],
)
def test_tokens_told_of_wrongly_are_refused(more: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Router(4, 8, 2, select=ExpertChoice())(torch.randn(12, 4), **more)
