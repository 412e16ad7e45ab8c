"""Capacity: no expert takes more than its bound, and what it keeps is what its rule says, exactly."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routing import (
    NOWHERE,
    Capacity,
    Choice,
    ExpertChoice,
    MaskRatio,
    Router,
    Rows,
    Select,
    Sigmoid,
    Sparsify,
    Threshold,
    Tokens,
    TopK,
    Weigh,
)
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
How = Literal["score", "position", "random"]
E = 6
FACTORS = st.sampled_from([0.01, 0.5, 0.9, 1.0, 1.1, 1.25, 1 / 3, 2.0, 50.0])
SELECTS: st.SearchStrategy[Select] = st.sampled_from(
    [TopK(), Threshold(most=4), ExpertChoice(within="batch", share=MaskRatio(least=1, most=5))]
)


class Case(NamedTuple):
    rows: Rows
    score_TE: Tensor
    luck_TE: Tensor
    top_k: int
    tokens: Tokens


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows of every selector, with padding or not; scores in eighths, so that many are equal, or no two."""
    top_k, num_tokens = draw(st.integers(1, 4)), draw(st.integers(0, 25))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    luck_TE = torch.rand(num_tokens, E, generator=generator)
    score_TE = torch.rand(num_tokens, E, generator=generator) + torch.linspace(0, 1, E)
    if draw(st.booleans()):
        score_TE = (score_TE * 8).round() / 8
    valid_T = torch.rand(num_tokens, generator=generator) < 0.7 if draw(st.booleans()) else None
    tokens = Tokens(valid_T, num_tokens, torch.tensor([0.3]))
    rows = draw(SELECTS)(score_TE, torch.full((E,), 0.8), top_k, tokens)
    if valid_T is not None:
        rows = rows._replace(expert_N=rows.expert_N.where(valid_T[rows.token_N], NOWHERE))
    return Case(rows, score_TE, luck_TE, top_k, tokens)


def by_hand(case: Case, factor: float, drop: How) -> list[int]:
    """The definition: each expert's rows in its order, the first so many kept. -> expert_N"""
    token_N, expert_N = case.rows.token_N.tolist(), case.rows.expert_N.tolist()
    real = len(case.score_TE) if case.tokens.valid_T is None else int(case.tokens.valid_T.sum())
    bound = max(1, math.ceil(Fraction(factor).limit_denominator(10**6) * case.top_k * real / E))
    worth = {"score": case.score_TE, "random": case.luck_TE, "position": torch.zeros_like(case.luck_TE)}[drop]
    kept = [NOWHERE] * len(token_N)
    for expert in range(E):
        line = [n for n in range(len(token_N)) if expert_N[n] == expert]
        line.sort(key=lambda n: (-worth[token_N[n], expert].item(), token_N[n]))
        for n in line[:bound]:
            kept[n] = expert
    return kept


@LAW
@given(cases(), FACTORS, st.sampled_from(["score", "position", "random"]))
def test_an_expert_keeps_the_first_of_its_line_up_to_its_bound(case: Case, factor: float, drop: How) -> None:
    given_N = case.rows.expert_N.clone()
    after = Capacity(factor=factor, drop=drop)(*case)
    assert after.expert_N.tolist() == by_hand(case, factor, drop)
    assert after.wanted_N is not None
    assert torch.equal(after.wanted_N, given_N)
    assert torch.equal(case.rows.expert_N, given_N), "the rows that were given have changed"
    assert torch.equal(after.token_N, case.rows.token_N)
    assert after.top_k == case.rows.top_k


def test_by_position_exactly_the_first_tokens_are_kept() -> None:
    """4096 tokens that all want expert 3: a top-k over equal marks would keep any of them."""
    expert_N = torch.full((4096,), 3)
    rows = Rows(torch.arange(4096), expert_N, 1)
    after = Capacity(factor=1.0, drop="position")(rows, torch.rand(4096, 8), None, 1, Tokens(None, 4096))
    assert torch.equal(after.expert_N != NOWHERE, torch.arange(4096) < 512)


@LAW
@given(st.integers(1, 10**9), st.integers(1, 512), st.decimals("0.01", "100", places=2))
def test_the_bound_is_rounded_up_from_the_factor_as_written(rows: int, num_experts: int, factor: object) -> None:
    exact = math.ceil(Fraction(str(factor)) * rows / num_experts)
    capacity = Capacity(factor=float(str(factor)))
    assert capacity.bound(rows, num_experts) == exact
    assert int(capacity.bound(torch.tensor(rows), num_experts)) == exact, "on the device as on the host"


def router(drop: How = "score", factor: float = 0.75, **more: object) -> tuple[Router, Tensor]:
    torch.manual_seed(0)
    options: dict[str, object] = {"score": Sigmoid(), "drop": Capacity(factor=factor, drop=drop), **more}
    return Router(8, E, 2, dtype=torch.float64, **options), torch.randn(40, 8, dtype=torch.float64)  # type: ignore[arg-type]


def test_what_was_wanted_and_what_was_kept_tell_the_dropped_share() -> None:
    layer, x_TD = router()
    choice = layer(x_TD)
    bound = math.ceil(0.75 * 2 * 40 / E)
    assert choice.load_E.tolist() == [min(wanted, bound) for wanted in choice.wanted_E.tolist()]
    assert int(choice.wanted_E.sum()) == 80
    assert 0 < 1 - int(choice.load_E.sum()) / 80 < 0.6
    assert (choice.weight_N[choice.expert_N == NOWHERE] == 0).all()


def test_padding_takes_no_room_and_makes_none() -> None:
    """The tokens that are real are kept and dropped as if the padding were not there."""
    layer, x_TD = router("position")
    valid_T = torch.arange(40) % 3 > 0
    padded, alone = layer(x_TD, valid_T), layer(x_TD[valid_T])
    assert torch.equal(padded.expert_TK[valid_T], alone.expert_TK)
    assert (padded.wanted_N.view(40, 2)[~valid_T] == NOWHERE).all()
    assert torch.equal(padded.wanted_E, alone.wanted_E)


def test_prices_decide_who_comes_but_not_who_is_kept() -> None:
    layer, x_TD = router()
    layer.price_E.copy_(torch.linspace(0.3, -0.3, E))
    choice = layer(x_TD)
    worst_kept_E, best_dropped_E = torch.full((E,), 9.0), torch.full((E,), -9.0)
    for token, wanted, kept in zip(choice.token_N.tolist(), choice.wanted_N.tolist(), choice.expert_N.tolist()):
        score = choice.score_TE[token, wanted].item()
        if kept >= 0:
            worst_kept_E[wanted] = min(worst_kept_E[wanted].item(), score)
        else:
            best_dropped_E[wanted] = max(best_dropped_E[wanted].item(), score)
    assert (best_dropped_E > -9).any()
    assert (worst_kept_E >= best_dropped_E).all()


@pytest.mark.parametrize("select", [TopK(), ExpertChoice(), Threshold(most=3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("over", ["kept", "wanted"])
def test_weights_are_shares_of_what_was_kept_or_of_what_was_wanted(
    select: Select, over: Literal["kept", "wanted"]
) -> None:
    layer, x_TD = router(select=select, weigh=Weigh(normalize=True, over=over))
    choice = layer(x_TD, length=20)
    of = choice.expert_N if over == "kept" else choice.wanted_N
    score_N = choice.score_TE[choice.token_N, choice.wanted_N.clamp(min=0)]
    total_T = torch.zeros(40, dtype=torch.float64).index_add(0, choice.token_N, score_N.where(of >= 0, 0.0))
    expected_N = (score_N / total_T[choice.token_N]).where(choice.expert_N >= 0, 0.0)
    torch.testing.assert_close(choice.weight_N, expected_N, rtol=1e-12, atol=1e-15)
    sum_T = torch.zeros(40, dtype=torch.float64).index_add(0, choice.token_N, choice.weight_N).detach()
    whole = [total == pytest.approx(1.0) for total in sum_T.tolist() if total > 0]
    assert all(whole) if over == "kept" else not all(whole)


def test_the_lot_is_drawn_anew_for_each_batch_and_again_the_same_in_a_recomputation() -> None:
    layer, x_TD = router("random")
    first, second = layer(x_TD), layer(x_TD)
    assert not torch.equal(first.expert_N, second.expert_N)
    assert torch.equal(first.load_E, second.load_E)

    for reentrant in (True, False):
        made: list[Choice] = []
        handle = layer.register_forward_hook(lambda module, inputs, choice, made=made: made.append(choice))

        def run(x_TD: Tensor) -> Tensor:
            return layer(x_TD).weight_N * torch.rand(80)  # whoever draws next draws the same again too

        x = x_TD.clone().requires_grad_()
        checkpoint(run, x, use_reentrant=reentrant).sum().backward()
        handle.remove()
        assert torch.equal(made[0].expert_N, made[1].expert_N)


def test_replaying_given_rows_draws_as_much_luck_as_deciding() -> None:
    layer, x_TD = router("random")
    torch.manual_seed(3)
    choice = layer(x_TD)
    after = torch.rand(1)
    torch.manual_seed(3)
    again = layer(x_TD, rows=Rows(choice.token_N, choice.expert_N, choice.top_k, choice.wanted_N))
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(again.weight_N, choice.weight_N)
    assert torch.equal(again.wanted_E, choice.wanted_E)


def test_the_bound_follows_k_when_the_schedule_switches() -> None:
    torch.manual_seed(0)
    schedule = Sparsify(stages=((0, 4), (1, 1)))
    layer = Router(8, E, schedule, drop=Capacity(factor=0.5))
    loads = []
    for _ in range(2):
        choice = layer(torch.randn(60, 8))
        layer.observe(choice)
        layer.settle()
        loads.append(int(choice.load_E.max()))
    assert loads == [math.ceil(0.5 * 4 * 60 / E), math.ceil(0.5 * 60 / E)]


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, 1e5])
def test_a_factor_that_bounds_nothing_or_everything_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=f"factor={factor}"):
        Capacity(factor=factor)


def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="drop by 'probs'"):
        Capacity(factor=1.0, drop="probs")  # type: ignore[arg-type]
