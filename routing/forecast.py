"""Forecasts of load, window by window, and their score on windows they have not seen. numpy, offline.

A plan is made for loads to come, so a forecast is worth what it adds to the simplest one: that the next windows will be
like the last. Shares are forecast, not rows: where experts should live does not depend on how many tokens will come. A
layer without a row in a window keeps the shares it had before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


class Forecaster(Protocol):
    def __call__(self, load_WLE: ArrayLike, horizon: int) -> FloatArray:
        """The shares of each layer's load in the next `horizon` windows. -> share_HLE, adding to 1 over experts."""


@dataclass(frozen=True, kw_only=True)
class Last:
    """The next windows will be like the last."""

    def __call__(self, load_WLE: ArrayLike, horizon: int) -> FloatArray:
        return _repeat(shares_of(load_WLE)[-1], horizon)


@dataclass(frozen=True, kw_only=True)
class Ema:
    """The next windows will be like the mean of those before, each older one weighing `decay` times the one after it.

    decay: 0 is Last, 1 the plain mean. Its memory is about 1 / (1 - decay) windows.
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay}; use 0 (only the last window) to 1 (all alike)")

    def __call__(self, load_WLE: ArrayLike, horizon: int) -> FloatArray:
        share_WLE = shares_of(load_WLE)
        weight_W = np.float64(self.decay) ** np.arange(len(share_WLE) - 1, -1, -1)
        return _repeat(np.tensordot(weight_W / weight_W.sum(), share_WLE, axes=1), horizon)


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """A layer's next shares are a line in its last `order` ones; what was forecast serves for the window after.

    The coefficients are a layer's, the same for all its experts, fitted by least squares to what each share had above
    an even one. A coefficient per expert would have to be learnt from as few windows as there are; shared, E times
    as many windows speak for it. With steady experts it becomes a mean over windows, with drifting ones nearly Last.
    """

    order: int

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order={self.order}; use 1 or more past windows")

    def __call__(self, load_WLE: ArrayLike, horizon: int) -> FloatArray:
        share_WLE = shares_of(load_WLE)
        windows, layers, num_experts = share_WLE.shape
        if windows <= self.order:
            raise ValueError(f"order {self.order} needs more than {self.order} windows to fit; got {windows}")
        above_WLE = share_WLE - 1 / num_experts
        past_PWLE = np.stack([above_WLE[self.order - lag : windows - lag] for lag in range(1, self.order + 1)])
        gram_LPP = np.einsum("pwle,qwle->lpq", past_PWLE, past_PWLE)
        aim_LP = np.einsum("pwle,wle->lp", past_PWLE, above_WLE[self.order :])
        # Loads that never change leave the sum of coefficients known but not each of them: the least ones are taken.
        line_LP = np.stack([np.linalg.lstsq(gram_LPP[layer], aim_LP[layer])[0] for layer in range(layers)])
        _require_horizon(horizon)
        known = [*above_WLE[-self.order :]]
        for _ in range(horizon):
            recent_PLE = np.stack(known[: -self.order - 1 : -1])
            share_LE = np.maximum(np.einsum("lp,ple->le", line_LP, recent_PLE) + 1 / num_experts, 0)
            known.append(share_LE / share_LE.sum(axis=-1, keepdims=True) - 1 / num_experts)
        forecast_HLE: FloatArray = np.stack(known[self.order :]) + 1 / num_experts
        return forecast_HLE


@dataclass(frozen=True, kw_only=True)
class ForecastScore:
    """How far forecasts fell from held-out windows, for each number of windows ahead; means over windows and layers.

    l1_H: the sum over experts of |forecast - actual| share; half of it is the share of rows that were expected
    elsewhere. last_l1_H: the same of Last. short_H: the expert that got most more than forecast, in multiples of an
    even share: what a rank made for the forecast finds too much. hot_H: of the E/8 busiest experts (at least one), the
    share that is among the E/8 forecast to be. Windows of few tokens differ by chance alone, and no forecast helps.
    """

    l1_H: tuple[float, ...]
    last_l1_H: tuple[float, ...]
    short_H: tuple[float, ...]
    hot_H: tuple[float, ...]

    @property
    def skill_H(self) -> tuple[float, ...]:
        """1 - l1 / last_l1: the share of Last's error that is avoided; 0 or less is no better than Last."""
        pairs = zip(self.l1_H, self.last_l1_H, strict=True)
        return tuple(1 - mine / last if last > 0 else (0.0 if mine == 0 else -np.inf) for mine, last in pairs)


def score_forecast(forecaster: Forecaster, load_WLE: ArrayLike, *, fit: int, horizon: int) -> ForecastScore:
    """Forecast `horizon` windows from each window after the first `fit`, with all before it known and none after.

    load_WLE: rows. A layer without a row in a window is left out of that window's score.
    """
    load_WLE = _table(load_WLE)
    if fit < 1 or horizon < 1 or fit + horizon > len(load_WLE):
        raise ValueError(
            f"fit={fit} and horizon={horizon} must be at least 1 and together at most the {len(load_WLE)} windows of "
            f"the trace"
        )
    actual_WLE, busy_WL = shares_of(load_WLE), load_WLE.sum(axis=-1) > 0
    error_H: list[list[FloatArray]] = [[] for _ in range(horizon)]
    for now in range(fit, len(load_WLE) - horizon + 1):
        share_HLE, last_LE = forecaster(load_WLE[:now], horizon), actual_WLE[now - 1]
        if share_HLE.shape != (horizon, *last_LE.shape):
            raise ValueError(f"the forecaster gave shape {share_HLE.shape}; expected {(horizon, *last_LE.shape)}")
        for ahead, error in enumerate(error_H):
            busy_L = busy_WL[now + ahead]
            error.append(_errors(share_HLE[ahead, busy_L], last_LE[busy_L], actual_WLE[now + ahead, busy_L]))
    scored_H = [np.concatenate(error, axis=1) for error in error_H]
    if idle := [ahead for ahead, error in enumerate(scored_H) if error.size == 0]:
        raise ValueError(f"no held-out window {idle[0] + 1} ahead has a row; score windows with load")
    l1_H, last_l1_H, short_H, hot_H = zip(*(error.mean(axis=1).tolist() for error in scored_H), strict=True)
    return ForecastScore(l1_H=l1_H, last_l1_H=last_l1_H, short_H=short_H, hot_H=hot_H)


def shares_of(load_WLE: ArrayLike) -> FloatArray:
    """Each expert's share of its layer's rows; a layer without a row keeps its last shares, even ones at the start."""
    load_WLE = _table(load_WLE)
    total_WL1 = load_WLE.sum(axis=-1, keepdims=True)
    share_WLE = load_WLE / np.where(total_WL1 > 0, total_WL1, 1)
    before_LE = np.full(load_WLE.shape[1:], 1 / load_WLE.shape[2])
    for share_LE, total_L1 in zip(share_WLE, total_WL1, strict=True):
        share_LE[:] = np.where(total_L1 > 0, share_LE, before_LE)
        before_LE = share_LE
    return share_WLE


def _errors(share_LE: FloatArray, last_LE: FloatArray, actual_LE: FloatArray) -> FloatArray:
    """l1, last_l1, short and hot of each layer. -> [4, L]"""
    num_experts = actual_LE.shape[1]
    hot = max(num_experts // 8, 1)
    expected_LH = np.argsort(-share_LE, axis=1, kind="stable")[:, :hot]
    busiest_LH = np.argsort(-actual_LE, axis=1, kind="stable")[:, :hot]
    return np.stack(
        [
            np.abs(share_LE - actual_LE).sum(axis=1),
            np.abs(last_LE - actual_LE).sum(axis=1),
            num_experts * (actual_LE - share_LE).max(axis=1),
            (expected_LH[:, :, None] == busiest_LH[:, None]).any(axis=2).mean(axis=1),
        ]
    )


def _repeat(share_LE: FloatArray, horizon: int) -> FloatArray:
    _require_horizon(horizon)
    return np.repeat(share_LE[None], horizon, axis=0)


def _require_horizon(horizon: int) -> None:
    if horizon < 1:
        raise ValueError(f"horizon={horizon}; forecast at least 1 window")


def _table(load_WLE: ArrayLike) -> FloatArray:
    try:
        table = np.asarray(load_WLE, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("load_WLE must be a table of numbers, every row of one length") from None
    if table.ndim != 3 or 0 in table.shape:
        raise ValueError(f"load_WLE must be a table [windows, layers, experts]; got shape {table.shape}")
    if not np.isfinite(table).all() or table.min() < 0:
        raise ValueError("load_WLE counts rows; it holds a number that is negative or not finite")
    return table
