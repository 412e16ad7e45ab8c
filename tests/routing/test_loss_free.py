"""LossFree: steps down the dual, from the loads alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing.balancer import Balancer
from routing.dual import dual_change, dual_value
from routing.loss_free import LossFree
from tests.routing.batches import LAW
from tests.routing.scored import choose, max_violation, popular

pytestmark = pytest.mark.fast


def settled(balancer: Balancer, loads: list[float], price_E: Tensor | None = None, steps: int = 0) -> Tensor:
    load_E = torch.tensor(loads, dtype=torch.float64)
    stats = {"load_E": load_E, "tokens": load_E.sum() / 2}
    price_E = torch.zeros(len(loads)) if price_E is None else price_E
    return balancer.settle(price_E, stats, 2, settled=torch.tensor(steps))


def test_the_sign_rule_moves_every_price_by_the_step() -> None:
    assert settled(LossFree(step=0.5), [4, 3, 1, 2, 2.4]).tolist() == [0.5, 0.5, -0.5, -0.5, -0.5]
    assert settled(LossFree(step=0.5), [9, 3, 0, 0, 3]).tolist() == [0.5, 0.0, -0.5, -0.5, 0.0]


def test_the_proportional_rule_moves_by_the_excess_over_the_mean() -> None:
    assert settled(LossFree(step=0.5, rule="proportional"), [8, 2, 2, 4]).tolist() == [0.5, -0.25, -0.25, 0.0]


def test_twice_the_tokens_are_the_same_excess() -> None:
    for rule in ("sign", "proportional"):
        balancer = LossFree(rule=rule)
        assert torch.equal(settled(balancer, [8, 2, 2, 5]), settled(balancer, [16, 4, 4, 10]))


def test_tokens_that_want_nobody_leave_the_prices_finite() -> None:
    """As can be when they choose by a threshold."""
    stats = {"load_E": torch.zeros(3, dtype=torch.float64), "tokens": torch.tensor(5.0)}
    for rule in ("sign", "proportional"):
        moved_E = LossFree(rule=rule).settle(torch.ones(3), stats, 1, settled=torch.tensor(0))
        assert moved_E.tolist() == [1.0, 1.0, 1.0]


def test_the_step_decays_to_its_floor() -> None:
    balancer = LossFree(step=0.5, decay=0.5, floor=0.125)
    for steps, expected in ((0, 0.5), (3, 0.25), (15, 0.125), (10**6, 0.125)):
        assert settled(balancer, [3, 1], steps=steps).tolist() == [expected, -expected]
    assert settled(LossFree(step=0.5), [3, 1], steps=10**6).tolist() == [0.5, -0.5]


@LAW
@given(st.lists(st.integers(0, 50), min_size=2, max_size=9), st.integers(0, 2**16))
def test_centred_prices_differ_by_a_shift_from_those_that_are_not(loads: list[int], seed: int) -> None:
    price_E = torch.randn(len(loads), generator=torch.Generator().manual_seed(seed))
    loads = [load + 1 for load in loads]
    for rule in ("sign", "proportional"):
        free_E = settled(LossFree(rule=rule), loads, price_E)
        centred_E = settled(LossFree(rule=rule, centred=True), loads, price_E)
        torch.testing.assert_close(free_E - free_E.mean(), centred_E, rtol=0, atol=1e-6)
        assert centred_E.mean().abs() < 1e-6


def test_two_thousand_small_steps_add_up() -> None:
    """In bf16 the price would have come to rest at 0.5."""
    price_E = torch.zeros(2)
    for _ in range(2000):
        price_E = settled(LossFree(step=1e-3), [3, 1], price_E)
    assert price_E.tolist() == pytest.approx([2.0, -2.0], abs=1e-3)


def descend(balancer: Balancer, score_TE: Tensor, top_k: int, steps: int) -> tuple[Tensor, list[float], float]:
    """On one batch, again and again. -> prices, the dual after every step, the worst error of the split"""
    price_E = torch.zeros(score_TE.shape[1], dtype=torch.float64)
    values, worst = [dual_value(score_TE, price_E, top_k).item()], 0.0
    for done in range(steps):
        load_E = choose(score_TE, price_E, top_k).load_E.double()
        stats = {"load_E": load_E, "tokens": torch.tensor(float(len(score_TE)))}
        moved_E = balancer.settle(price_E, stats, top_k, settled=torch.tensor(done))
        change = dual_change(score_TE, price_E, moved_E - price_E, top_k)
        price_E = moved_E
        values.append(dual_value(score_TE, price_E, top_k).item())
        worst = max(worst, abs(values[-1] - values[-2] - float(change.linear + change.switching)))
    return price_E, values, worst


@pytest.mark.parametrize("rule, step, rises", [("sign", 1e-3, False), ("sign", 1e-2, True)])
def test_small_sign_steps_never_raise_the_dual_and_large_ones_do(rule: str, step: float, rises: bool) -> None:
    score_TE = popular(2048, 16, seed=3, score="sigmoid")
    _, values, worst = descend(LossFree(step=step), score_TE, 4, 300)
    assert worst < 1e-9
    assert any(after > before + 1e-9 for before, after in pairwise(values)) == rises


def test_proportional_steps_balance_a_batch_to_a_thousandth() -> None:
    score_TE = popular(2048, 16, seed=3, score="sigmoid")
    price_E, _, worst = descend(LossFree(step=0.01, rule="proportional"), score_TE, 4, 300)
    assert worst < 1e-9
    assert max_violation(choose(score_TE, price_E, 4)) < 1e-3
