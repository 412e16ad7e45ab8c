"""Router: what is chosen follows score less price, what it weighs follows the score alone, and padding goes nowhere."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routing import NOWHERE, Choice, Router, Rows, Score, Sigmoid, Softmax, Tokens, TopK, Unpriced, Weigh
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast

D, E = 6, 8
FEW = settings(LAW, max_examples=40)
SEEDS = st.integers(0, 2**16)
SCORES: st.SearchStrategy[Score] = st.sampled_from([Softmax(), Sigmoid()])
SELECTS = st.sampled_from([TopK(), TopK(groups=4, keep=2, worth="top2sum")])


def router(
    seed: int,
    top_k: int = 3,
    *,
    score: Score = Softmax(),
    select: TopK = TopK(),
    weigh: Weigh = Weigh(),
    dtype: torch.dtype = torch.float64,
) -> Router:
    """A router that already quotes prices, as large as its scores."""
    torch.manual_seed(seed)
    made = Router(D, E, top_k, score=score, select=select, weigh=weigh, dtype=dtype)
    made.price_E.copy_(torch.randn(E))
    return made


def tokens(seed: int, num_tokens: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype)


def chosen_score(choice: Choice) -> Tensor:
    return choice.score_TE[choice.token_N, choice.expert_N]


@FEW
@given(SEEDS, SCORES, SELECTS, st.integers(1, 4))
def test_a_token_chooses_by_score_less_price(seed: int, score: Score, select: TopK, top_k: int) -> None:
    layer = router(seed, top_k, score=score, select=select)
    choice = layer(tokens(seed))
    expected = select(score(tokens(seed) @ layer.weight.T), layer.price_E, top_k, Tokens(None, 0))
    assert torch.equal(choice.expert_N, expected.expert_N)
    assert torch.equal(choice.token_N, expected.token_N)
    assert choice.top_k == top_k


@FEW
@given(SEEDS, SCORES, st.integers(1, 4))
def test_whatever_the_prices_a_weight_is_the_score_to_the_bit(seed: int, score: Score, top_k: int) -> None:
    choice = router(seed, top_k, score=score)(tokens(seed))
    assert torch.equal(choice.weight_N, chosen_score(choice))
    assert torch.equal(choice.score_TE, score(choice.logit_TE))


@FEW
@given(SEEDS, st.floats(0.1, 8.0), st.integers(1, 4))
def test_normalized_weights_share_the_scale_as_the_scores_do(seed: int, scale: float, top_k: int) -> None:
    choice = router(seed, top_k, score=Sigmoid(), weigh=Weigh(normalize=True, scale=scale))(tokens(seed))
    score_TK = chosen_score(choice).view(-1, top_k)
    expected_TK = scale * score_TK / score_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(choice.weight_N.view(-1, top_k), expected_TK, rtol=1e-12, atol=0)


def test_scale_alone_multiplies_the_scores() -> None:
    choice = router(0, weigh=Weigh(scale=2.5))(tokens(0))
    assert torch.equal(choice.weight_N, chosen_score(choice) * 2.5)


def test_rows_of_any_shape_are_normalized_token_by_token() -> None:
    """Three rows of token 0, none of token 1, one of token 2 and one of its rows dropped."""
    rows = Rows(torch.tensor([2, 0, 0, 2, 0]), torch.tensor([5, 1, 2, NOWHERE, 7]), None)
    choice = router(1, weigh=Weigh(normalize=True))(tokens(1, 3), rows=rows)
    score_N = choice.score_TE[0, [1, 2, 7]]
    torch.testing.assert_close(choice.weight_N[[1, 2, 4]], score_N / score_N.sum(), rtol=1e-12, atol=0)
    assert choice.weight_N[[0, 3]].tolist() == [1.0, 0.0]


@FEW
@given(SEEDS, SCORES, st.booleans())
def test_prices_change_no_gradient_of_the_same_rows(seed: int, score: Score, normalize: bool) -> None:
    layer = router(seed, score=score, weigh=Weigh(normalize=normalize))
    first = layer(tokens(seed))
    first.weight_N.square().sum().backward()
    assert layer.weight.grad is not None
    grad, layer.weight.grad = layer.weight.grad.clone(), None
    layer.price_E.neg_()
    layer(tokens(seed), rows=Rows(first.token_N, first.expert_N, first.top_k)).weight_N.square().sum().backward()
    assert torch.equal(layer.weight.grad, grad)


@FEW
@given(SEEDS, SCORES, st.booleans())
def test_given_rows_are_replayed_with_weights_and_gradient_of_todays_router(
    seed: int, score: Score, normalize: bool
) -> None:
    yesterday = router(seed, score=score)(tokens(seed))
    rows = Rows(yesterday.token_N, yesterday.expert_N, yesterday.top_k)
    today = router(seed + 1, score=score, weigh=Weigh(normalize=normalize))
    choice = today(tokens(seed), rows=rows)
    assert torch.equal(choice.expert_N, rows.expert_N)
    assert torch.equal(choice.token_N, rows.token_N)
    direction = torch.linspace(-1, 1, len(rows.token_N), dtype=torch.float64)
    (choice.weight_N @ direction).backward()

    weight = today.weight.detach().clone().requires_grad_()
    weight_TK = score(tokens(seed) @ weight.T).gather(1, yesterday.expert_TK)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
    (weight_TK.flatten() @ direction).backward()
    torch.testing.assert_close(choice.weight_N, weight_TK.flatten(), rtol=1e-12, atol=0)
    torch.testing.assert_close(today.weight.grad, weight.grad, rtol=1e-10, atol=1e-14)


@FEW
@given(SEEDS, st.lists(st.booleans(), min_size=1, max_size=11), st.booleans(), st.sampled_from([0.0, float("nan")]))
def test_padding_is_neither_routed_nor_counted_nor_weighed(
    seed: int, valid: list[bool], normalize: bool, filler: float
) -> None:
    """The valid tokens are routed exactly as if the padding were not there."""
    layer, valid_T = router(seed, weigh=Weigh(normalize=normalize)), torch.tensor(valid)
    x_TD = tokens(seed, len(valid))
    choice = layer(x_TD.where(valid_T[:, None], filler), valid_T)
    alone = layer(x_TD[valid_T])
    routed_N = valid_T[choice.token_N]
    assert (choice.expert_N[~routed_N] == NOWHERE).all()
    assert (choice.weight_N[~routed_N] == 0).all()
    assert torch.equal(choice.expert_N[routed_N], alone.expert_N)
    torch.testing.assert_close(choice.weight_N[routed_N], alone.weight_N, rtol=1e-12, atol=0)
    assert torch.equal(choice.load_E, alone.load_E)
    assert int(choice.load_E.sum()) == 3 * sum(valid)


@FEW
@given(SEEDS, st.lists(st.booleans(), min_size=1, max_size=11), SCORES, st.booleans())
def test_what_padding_holds_reaches_no_gradient(seed: int, valid: list[bool], score: Score, normalize: bool) -> None:
    layer, valid_T = router(seed, score=score, weigh=Weigh(normalize=normalize)), torch.tensor(valid)
    grads = []
    for filler in (0.0, float("nan"), float("inf")):
        layer.weight.grad = None
        x_TD = tokens(seed, len(valid)).where(valid_T[:, None], filler).requires_grad_()
        choice = layer(x_TD, valid_T)
        (choice.weight_N.square().sum() + choice.score_TE[valid_T].sum() + choice.logit_TE[valid_T].sum()).backward()
        assert x_TD.grad is not None
        assert layer.weight.grad is not None
        assert not x_TD.grad[~valid_T].any()
        assert torch.isfinite(x_TD.grad).all()
        grads.append((x_TD.grad, layer.weight.grad))
    for x_grad, weight_grad in grads[1:]:
        assert torch.equal(x_grad, grads[0][0])
        assert torch.equal(weight_grad, grads[0][1])


@FEW
@given(st.lists(st.integers(NOWHERE, E - 1), max_size=40))
def test_the_load_counts_each_row_once_and_rows_to_nowhere_never(experts: list[int]) -> None:
    rows = Rows(torch.zeros(len(experts), dtype=torch.int64), torch.tensor(experts, dtype=torch.int64), None)
    load_E = router(0)(tokens(0, 1), rows=rows).load_E
    assert load_E.dtype == torch.int64
    assert load_E.tolist() == [experts.count(expert) for expert in range(E)]


def test_no_tokens_are_routed_nowhere() -> None:
    choice = router(0, weigh=Weigh(normalize=True))(tokens(0, 0))
    assert choice.weight_N.shape == choice.token_N.shape == (0,)
    assert choice.load_E.tolist() == [0] * E
    choice.weight_N.sum().backward()


def test_the_lines_of_a_choice_are_its_tokens_and_other_rows_have_none() -> None:
    choice = router(0)(tokens(0))
    assert torch.equal(choice.expert_TK.flatten(), choice.expert_N)
    ragged = router(0)(tokens(0), rows=Rows(torch.tensor([0]), torch.tensor([1]), None))
    with pytest.raises(ValueError, match="any number of rows"):
        _ = ragged.expert_TK


@dataclass(frozen=True)
class Quoting(Unpriced):
    """Quotes from this batch, and from the standing price."""

    def quote(
        self, score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None, settled: Tensor
    ) -> Tensor:
        assert not score_TE.requires_grad
        return price_E + score_TE.mean(dim=0) * top_k


def test_the_balancers_quote_decides_and_leaves_the_standing_price_alone() -> None:
    layer = router(3)
    layer.balancer = Quoting()
    before = layer.price_E.clone()
    choice = layer(tokens(3))
    score_TE = choice.score_TE.detach()
    expected = TopK()(score_TE, before + score_TE.mean(dim=0) * 3, 3, Tokens(None, 0))
    assert torch.equal(choice.expert_N, expected.expert_N)
    assert torch.equal(layer.price_E, before)


def test_a_router_of_an_impossible_choice_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="top_k=9 of 8 experts"):
        Router(D, E, 9)
    with pytest.raises(ValueError, match="hold only 2 experts"):
        Router(D, E, 3, select=TopK(groups=4, keep=1))
