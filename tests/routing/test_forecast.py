"""Forecasters: what they say of loads whose law is known, and that a score sees nothing ahead of time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from routing.forecast import Autoregressive, Ema, Forecaster, Last, score_forecast, shares_of
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
FloatArray = NDArray[np.float64]
EVERY: tuple[Forecaster, ...] = (Last(), Ema(decay=0.7), Autoregressive(order=1), Autoregressive(order=3))


def steady(windows: int = 60, rows: int = 2000) -> FloatArray:
    """The same experts are popular all the time; counts differ by chance."""
    rng = np.random.default_rng(0)
    share_LE = rng.dirichlet(np.ones(16), size=2)
    return np.stack([[rng.multinomial(rows, share_E) for share_E in share_LE] for _ in range(windows)]).astype(float)


def drifting(windows: int = 60) -> FloatArray:
    """Popularity wanders: what was, is the best guess of what will be."""
    step_WLE = 0.3 * np.random.default_rng(1).standard_normal((windows, 2, 16))
    return 1000 * np.exp(step_WLE.cumsum(axis=0))


@LAW
@given(st.integers(0, 2**16), st.integers(4, 12), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4))
def test_a_forecast_is_shares_whatever_the_loads(
    seed: int, windows: int, layers: int, experts: int, horizon: int
) -> None:
    rng = np.random.default_rng(seed)
    load_WLE = rng.integers(0, 50, (windows, layers, experts)) * (rng.random((windows, layers, 1)) < 0.8)
    for forecaster in EVERY:
        share_HLE = forecaster(load_WLE, horizon)
        assert share_HLE.shape == (horizon, layers, experts)
        assert share_HLE.min() >= 0
        np.testing.assert_allclose(share_HLE.sum(axis=-1), 1)


@pytest.mark.parametrize("forecaster", EVERY, ids=repr)
def test_loads_that_never_change_are_forecast_to_the_last_digit(forecaster: Forecaster) -> None:
    load_WLE = np.tile([[4.0, 3.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], (8, 1, 1))
    np.testing.assert_allclose(forecaster(load_WLE, 3), shares_of(load_WLE)[:3], atol=1e-12)
    score = score_forecast(forecaster, load_WLE, fit=4, horizon=2)
    assert score.l1_H == pytest.approx((0, 0), abs=1e-12)
    assert score.hot_H == (1, 1)


def test_ema_runs_from_last_to_the_plain_mean() -> None:
    load_WLE = drifting()
    np.testing.assert_allclose(Ema(decay=0)(load_WLE, 2), Last()(load_WLE, 2))
    np.testing.assert_allclose(Ema(decay=1)(load_WLE, 1)[0], shares_of(load_WLE).mean(axis=0))
    two_WLE = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    np.testing.assert_allclose(Ema(decay=0.5)(two_WLE, 1), [[[1 / 3, 2 / 3]]])


def test_an_autoregression_finds_the_rule_that_made_the_loads() -> None:
    """Shares that swing to the other side of even every window: the coefficient is -1, and Last is always wrong."""
    swing_WLE = np.tile([[[3.0, 1.0]], [[1.0, 3.0]]], (6, 1, 1))
    np.testing.assert_allclose(Autoregressive(order=1)(swing_WLE, 3)[:, 0, 0], [0.75, 0.25, 0.75])
    assert score_forecast(Autoregressive(order=1), swing_WLE, fit=4, horizon=2).skill_H == pytest.approx((1, 0))
    assert score_forecast(Autoregressive(order=1), swing_WLE, fit=4, horizon=2).last_l1_H == (1, 0)


def test_memory_helps_where_experts_are_steady_and_hurts_where_they_drift() -> None:
    still, wander = steady(), drifting()
    assert min(score_forecast(Ema(decay=0.9), still, fit=20, horizon=3).skill_H) > 0.2
    assert min(score_forecast(Autoregressive(order=4), still, fit=20, horizon=3).skill_H) > 0.2
    assert max(score_forecast(Ema(decay=0.9), wander, fit=20, horizon=3).skill_H) < -0.3
    learnt = score_forecast(Autoregressive(order=4), wander, fit=20, horizon=3).skill_H
    assert min(learnt) > -0.15, "an autoregression learns to be nearly Last"


def test_last_has_no_skill_over_itself() -> None:
    score = score_forecast(Last(), drifting(), fit=10, horizon=3)
    assert score.l1_H == score.last_l1_H
    assert score.skill_H == (0, 0, 0)
    assert score.l1_H[0] < score.l1_H[1] < score.l1_H[2], "further ahead is harder"


class Spy:
    """Answers with an even share, and writes down what it was shown."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, load_WLE: ArrayLike, horizon: int) -> FloatArray:
        shown = np.asarray(load_WLE)
        self.seen.append(len(shown))
        return np.full((horizon, *shown.shape[1:]), 1 / shown.shape[2])


def test_a_score_shows_a_forecaster_the_past_alone() -> None:
    spy = Spy()
    score_forecast(spy, drifting(12), fit=5, horizon=3)
    assert spy.seen == [5, 6, 7, 8, 9]


def test_the_measures_of_a_worked_example() -> None:
    score = score_forecast(Last(), [[[8.0, 0, 0, 0]], [[1.0, 5, 1, 1]]], fit=1, horizon=1)
    assert score.l1_H == (1.75,)
    assert score.short_H == (2.5,)
    assert score.hot_H == (0,)


def test_a_layer_without_rows_is_not_scored_and_keeps_its_shares() -> None:
    load_WLE = np.array([[[3.0, 1.0]], [[0.0, 0.0]], [[1.0, 3.0]]])
    assert Last()(load_WLE[:2], 1).tolist() == [[[0.75, 0.25]]]
    assert score_forecast(Last(), load_WLE, fit=1, horizon=1).l1_H == (1,)
    with pytest.raises(ValueError, match="no held-out window 1 ahead"):
        score_forecast(Last(), load_WLE[:2], fit=1, horizon=1)


def test_what_cannot_be_is_refused() -> None:
    good = drifting(6)
    cases = {
        "at most the 6 windows": lambda: score_forecast(Last(), good, fit=5, horizon=2),
        "fit=0": lambda: score_forecast(Last(), good, fit=0, horizon=2),
        "horizon=0": lambda: Last()(good, 0),
        "horizon=-1": lambda: Autoregressive(order=1)(good, -1),
        "got shape": lambda: Last()(good[0], 1),
        "negative or not finite": lambda: Last()(-good, 1),
        "not finite": lambda: Last()(good * math.nan, 1),
        "of one length": lambda: Last()([[[1]], [[1, 2]]], 1),
        "decay=1.5": lambda: Ema(decay=1.5),
        "order=0": lambda: Autoregressive(order=0),
        "order 6 needs": lambda: Autoregressive(order=6)(good, 1),
        "the forecaster gave": lambda: score_forecast(lambda load, _: Last()(load, 1), good, fit=2, horizon=2),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
