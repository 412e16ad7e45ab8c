"""The dual of balanced routing: a bound at any prices, best where it says, and what a step of the prices does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routing.dual import (
    dual_change,
    dual_gap,
    dual_value,
    expert_ends,
    expert_lower,
    kept_score,
    token_ends,
    token_lower,
    transposed,
)
from tests.routing.batches import LAW
from tests.routing.lp import optimum
from tests.routing.scored import STALL, choose, max_violation, popular, scored

pytestmark = pytest.mark.fast

SEEDS = st.integers(0, 2**16)


@st.composite
def problems(draw: st.DrawFn, whole: bool = False, most: int = 40) -> tuple[Tensor, int]:
    """Scores and a top_k < E. whole: small integers, so that there are ties everywhere."""
    num_tokens, num_experts = draw(st.integers(1, most)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(SEEDS))
    logit_TE = rng.standard_normal((num_tokens, num_experts)) + 2 * rng.standard_normal(num_experts)
    logit_TE = torch.from_numpy(logit_TE.round() if whole else logit_TE)
    return logit_TE, draw(st.integers(1, num_experts - 1))


@settings(LAW, max_examples=60)
@given(problems(), SEEDS, st.sampled_from(["softmax", "sigmoid", "logit"]))
def test_at_any_prices_the_dual_is_no_less_than_what_balance_can_keep(
    problem: tuple[Tensor, int], seed: int, score: str
) -> None:
    score_TE, top_k = scored(problem[0], score), problem[1]
    best = optimum(score_TE.numpy(), top_k)
    scale = 1 + abs(best.value)
    price_E = torch.from_numpy(np.random.default_rng(seed).standard_normal(score_TE.shape[1]))
    assert dual_value(score_TE, price_E, top_k) >= best.value - 1e-9 * scale
    assert abs(dual_value(score_TE, torch.from_numpy(best.price_E), top_k) - best.value) <= 1e-9 * scale


@settings(LAW, max_examples=60)
@given(problems(), st.floats(-5, 5))
def test_the_same_for_every_price_is_nothing_to_the_dual(problem: tuple[Tensor, int], shift: float) -> None:
    score_TE, top_k = problem
    price_E = score_TE.mean(dim=0)
    expected = dual_value(score_TE, price_E, top_k)
    torch.testing.assert_close(dual_value(score_TE, price_E + shift, top_k), expected, rtol=1e-12, atol=1e-9)


@LAW
@given(st.booleans().flatmap(lambda whole: problems(whole=whole)))
def test_the_ends_are_the_neighbours_in_order_that_the_definition_names(problem: tuple[Tensor, int]) -> None:
    margin_TE, top_k = problem
    num_tokens, num_experts = margin_TE.shape
    down_TE = margin_TE.sort(dim=0, descending=True).values
    ends = expert_ends(transposed(margin_TE), top_k)
    assert torch.equal(ends.lower, down_TE[num_tokens * top_k // num_experts])
    assert torch.equal(ends.upper, down_TE[-(-num_tokens * top_k // num_experts) - 1])
    assert torch.equal(expert_lower(transposed(margin_TE), top_k), ends.lower)
    across_TE = margin_TE.sort(dim=1, descending=True).values
    assert torch.equal(token_ends(margin_TE, top_k).upper, across_TE[:, top_k - 1])
    assert torch.equal(token_ends(margin_TE, top_k).lower, across_TE[:, top_k])
    assert torch.equal(token_lower(margin_TE, top_k), across_TE[:, top_k])


@LAW
@given(st.booleans().flatmap(lambda whole: problems(whole=whole)), st.floats(0, 1))
def test_between_its_ends_a_price_is_best_and_beyond_them_it_is_not(problem: tuple[Tensor, int], share: float) -> None:
    margin_TE, top_k = problem
    num_tokens, num_experts = margin_TE.shape
    ends = expert_ends(transposed(margin_TE), top_k)

    def cost_E(price_E: Tensor) -> Tensor:
        return num_tokens * top_k / num_experts * price_E + (margin_TE - price_E).clamp(min=0).sum(dim=0)

    best_E = cost_E(ends.lower)
    torch.testing.assert_close(cost_E(ends.lower + share * (ends.upper - ends.lower)), best_E, rtol=1e-12, atol=1e-9)
    assert (cost_E(ends.lower - 0.01) > best_E + 1e-6).all()
    assert (cost_E(ends.upper + 0.01) > best_E + 1e-6).all()


@LAW
@given(st.booleans().flatmap(lambda whole: problems(whole=whole)), SEEDS)
def test_among_padding_the_ends_are_those_of_the_tokens(problem: tuple[Tensor, int], seed: int) -> None:
    margin_TE, top_k = problem
    valid_T = torch.from_numpy(np.random.default_rng(seed).random(len(margin_TE)) < 0.7)
    valid_T[0] = True
    for padding in (float("nan"), 1e9):
        padded_ET = transposed(margin_TE.where(valid_T[:, None], padding))
        alone = expert_ends(transposed(margin_TE[valid_T]), top_k)
        among = expert_ends(padded_ET, top_k, valid_T)
        assert torch.equal(among.lower, alone.lower)
        assert torch.equal(among.upper, alone.upper)
        assert torch.equal(expert_lower(padded_ET, top_k, valid_T), alone.lower)


def test_padding_adds_nothing_to_the_dual() -> None:
    score_TE, valid_T = popular(40, 8), torch.arange(40) % 3 > 0
    padded_TE, price_E = score_TE.where(valid_T[:, None], float("nan")), torch.linspace(0, 0.1, 8)
    expected = dual_value(score_TE[valid_T], price_E, 2)
    torch.testing.assert_close(dual_value(padded_TE, price_E, 2, valid_T), expected, rtol=1e-12, atol=0)


def test_the_optimum_of_the_fixture_is_what_it_was_measured_to_be() -> None:
    score_TE = popular(512, 16)
    best = optimum(score_TE.numpy(), 4)
    assert best.value == pytest.approx(298.083265, abs=1e-4)
    assert np.abs(best.x_TE - best.x_TE.round()).max() < 1e-6
    assert score_TE.topk(4).values.sum().item() == pytest.approx(344.659707, abs=1e-6)
    assert max_violation(choose(score_TE, torch.zeros(16), 4)) == 1.703125
    assert optimum(score_TE.numpy(), 1).value == pytest.approx(118.534078, abs=1e-6)
    assert optimum(STALL.numpy(), 1).value == pytest.approx(4.88, abs=1e-9)


def test_the_gap_is_zero_at_the_best_prices_and_only_there() -> None:
    score_TE = popular(512, 16)
    best = optimum(score_TE.numpy(), 4)
    assert abs(dual_gap(score_TE, torch.from_numpy(best.price_E), 4, kept=best.value)) < 1e-12
    assert dual_gap(score_TE, torch.zeros(16), 4, kept=best.value) == pytest.approx(344.659707 / 298.083265 - 1)


def test_top_k_keeps_all_of_the_score_and_a_priced_choice_less() -> None:
    score_TE = popular(64, 8)
    assert kept_score(choose(score_TE, torch.zeros(8), 2)) == pytest.approx(1.0)
    priced = choose(score_TE, torch.linspace(0, 0.3, 8), 2)
    assert kept_score(priced) == pytest.approx(float(priced.weight_N.sum() / score_TE.topk(2).values.sum()))
    half_T = torch.arange(64) < 32
    assert kept_score(choose(score_TE, torch.zeros(8), 2, half_T)) == pytest.approx(1.0)
    assert kept_score(choose(score_TE, torch.zeros(8), 2, half_T & ~half_T)) == 1.0


@settings(LAW, max_examples=60)
@given(problems(), SEEDS, st.sampled_from([1e-3, 0.1, 3.0]))
def test_a_step_changes_the_dual_by_its_two_parts_and_tokens_only_gain(
    problem: tuple[Tensor, int], seed: int, size: float
) -> None:
    score_TE, top_k = problem
    rng = np.random.default_rng(seed)
    price_E, step_E = (torch.from_numpy(rng.standard_normal(score_TE.shape[1])) for _ in range(2))
    change = dual_change(score_TE, price_E, size * step_E, top_k)
    after, before = (dual_value(score_TE, each_E, top_k) for each_E in (price_E + size * step_E, price_E))
    assert after - before == pytest.approx(float(change.linear + change.switching), abs=1e-9)
    assert change.switching >= -1e-12


@settings(LAW, max_examples=60)
@given(problems(), SEEDS)
def test_a_token_moves_only_to_experts_whose_price_rose_no_more(problem: tuple[Tensor, int], seed: int) -> None:
    score_TE, top_k = problem
    rng = np.random.default_rng(seed)
    price_E, step_E = (torch.from_numpy(rng.standard_normal(score_TE.shape[1])) for _ in range(2))
    picks = [choose(score_TE, each_E, top_k).expert_TK for each_E in (price_E, price_E + step_E)]
    before_TE, after_TE = (torch.zeros_like(score_TE).scatter(1, each_TK, 1.0).bool() for each_TK in picks)
    left_T = step_E.expand_as(score_TE).masked_fill(~(before_TE & ~after_TE), np.inf).amin(dim=1)
    joined_T = step_E.expand_as(score_TE).masked_fill(~(after_TE & ~before_TE), -np.inf).amax(dim=1)
    assert (joined_T <= left_T).all()
