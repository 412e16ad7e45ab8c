"""The optimum of balanced routing on the device: a primal-dual interior-point method, a fixed number of steps.

With x the choice, w = 1 - x, p and q the tokens' and the experts' prices, z and v what a pair loses by being chosen or
gains by it, x is optimal where

    each token's x sum to K, each expert's to C      score - p - q + z - v = 0      x z = 0, w v = 0      all >= 0

Every x = K / E satisfies the first, any p and q the second for some z and v. Newton's steps keep both, and bring x z
and w v to zero together. (Mehrotra's predictor and corrector: a step straight at zero tells how far a step can go; the
one taken aims that much less far, and corrects for the curvature.) A step costs one product of [E, T] and [T, E], and a
system of E equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from routing.dual import dual_value, token_ends

SPREAD = 0.03  # of the margins: how far from zero z and v begin
SHORT = 0.99  # of the way to where something would turn negative


class Optimum(NamedTuple):
    """price_E: the best met. kept: the most score met of a balanced choice, in fractions. Both float64.

    Some balanced choice keeps `kept` or more, and none keeps more than `dual_value`, at any prices.
    """

    price_E: Tensor
    kept: Tensor


class _Point(NamedTuple):
    """Also a direction from one point to the next."""

    p_T: Tensor
    q_E: Tensor
    x_TE: Tensor
    w_TE: Tensor
    z_TE: Tensor
    v_TE: Tensor

    def moved(self, along: _Point, primal: Tensor, dual: Tensor) -> _Point:
        lengths = (dual, dual, primal, primal, dual, dual)
        return _Point(*(mine + length * step for mine, step, length in zip(self, along, lengths)))

    @property
    def products(self) -> tuple[Tensor, Tensor]:
        return self.x_TE * self.z_TE, self.w_TE * self.v_TE


@torch.no_grad()
def optimize(score_TE: Tensor, price_E: Tensor, top_k: int, steps: int, valid_T: Tensor | None = None) -> Optimum:
    """From these prices towards the best. top_k < E.

    Twelve steps from prices of a few quantile rounds come within 1e-6 of the optimum nearly always, twenty within 1e-8.
    No price but the best met is returned, and that is never worse than what it began with.
    """
    score_TE, best_E = score_TE.double(), price_E.double()
    if valid_T is None:
        valid_T = torch.ones_like(score_TE[:, 0], dtype=torch.bool)
    score_TE = score_TE.where(valid_T[:, None], 0.0)
    mask_TE = valid_T[:, None].double().expand_as(score_TE)
    pairs = 2 * mask_TE.sum().clamp(min=1)
    point = _start(score_TE, best_E, top_k, mask_TE, pairs)
    best, kept = dual_value(score_TE, best_E, top_k, valid_T), (score_TE * point.x_TE * mask_TE).sum()
    for _ in range(steps):
        solve = _newton(point, mask_TE)
        xz_TE, wv_TE = point.products
        now = ((xz_TE + wv_TE) * mask_TE).sum() / pairs
        predicted = solve(-xz_TE, -wv_TE)
        after_xz_TE, after_wv_TE = point.moved(predicted, *_lengths(point, predicted)).products
        aim = now * (((after_xz_TE + after_wv_TE) * mask_TE).sum() / pairs / now) ** 3
        corrected = solve(aim - xz_TE - predicted.x_TE * predicted.z_TE, aim - wv_TE - predicted.w_TE * predicted.v_TE)
        point = point.moved(corrected, *_lengths(point, corrected))
        value = dual_value(score_TE, point.q_E, top_k, valid_T)
        better = value < best  # false for NaN, which rounding may bring once the optimum is met
        best, best_E = torch.where(better, value, best), torch.where(better, point.q_E, best_E)
        value = (score_TE * point.x_TE * mask_TE).sum()
        kept = torch.where(value > kept, value, kept)
    return Optimum(best_E, kept)


def _start(score_TE: Tensor, price_E: Tensor, top_k: int, mask_TE: Tensor, pairs: Tensor) -> _Point:
    p_T = token_ends(score_TE - price_E, top_k).middle
    gain_TE = score_TE - p_T[:, None] - price_E
    spread = SPREAD * (2 * (gain_TE.square() * mask_TE).sum() / pairs).sqrt()
    x_TE = torch.full_like(score_TE, top_k / score_TE.shape[1])
    return _Point(p_T, price_E, x_TE, 1 - x_TE, (-gain_TE).clamp(min=0) + spread, gain_TE.clamp(min=0) + spread)


def _newton(point: _Point, mask_TE: Tensor) -> Callable[[Tensor, Tensor], _Point]:
    """The direction in which, to first order, x z and w v change by given amounts and all sums stay as they are."""
    _, _, x_TE, w_TE, z_TE, v_TE = point
    d_TE = mask_TE / (z_TE / x_TE + v_TE / w_TE)
    sum_T, sum_E = d_TE.sum(dim=1), d_TE.sum(dim=0)
    sum_T = sum_T.where(sum_T > 0, 1.0)  # padding
    # All prices of experts up and all of tokens down changes nothing; the last term forbids it.
    matrix_EE = sum_E.diag() - d_TE.T @ (d_TE / sum_T[:, None]) + sum_E.mean() / len(sum_E)

    def solve(xz_TE: Tensor, wv_TE: Tensor) -> _Point:
        h_TE = xz_TE / x_TE - wv_TE / w_TE
        dh_TE = d_TE * h_TE
        right_E = dh_TE.sum(dim=0) - d_TE.T @ (dh_TE.sum(dim=1) / sum_T)
        q_E = torch.linalg.solve_ex(matrix_EE, right_E).result
        p_T = (dh_TE.sum(dim=1) - d_TE @ q_E) / sum_T
        dx_TE = d_TE * (h_TE - p_T[:, None] - q_E)
        dz_TE, dv_TE = (xz_TE - z_TE * dx_TE) / x_TE, (wv_TE + v_TE * dx_TE) / w_TE
        return _Point(p_T, q_E, dx_TE, -dx_TE, dz_TE * mask_TE, dv_TE * mask_TE)

    return solve


def _lengths(point: _Point, along: _Point) -> tuple[Tensor, Tensor]:
    """How much of the step keeps everything positive. -> for the choice, for the prices"""
    return (
        _length(-along.x_TE / point.x_TE, -along.w_TE / point.w_TE),
        _length(-along.z_TE / point.z_TE, -along.v_TE / point.v_TE),
    )


def _length(shrinks_TE: Tensor, shrinks_too_TE: Tensor) -> Tensor:
    return (SHORT / torch.maximum(shrinks_TE.max(), shrinks_too_TE.max()).clamp(min=1e-30)).clamp(max=1.0)
