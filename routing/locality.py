"""Locality: how much of a router's next choices can be known from a short stretch of its sequence. numpy, offline.

SRP, segment routing best performance: load for every stretch of m tokens the experts used at least t times in it; the
F1 score of that guess, at the best t. It asks whether few experts serve a stretch, as a device that prefetches needs.

SCH, segment cache best hit rate: a cache of C experts that must take in every expert used and then evicts the one used
least in the next m - 1 tokens. It asks what a cache that sees m tokens ahead would hit. It is not the best cache there
is: a cycle of 4 experts through 3 places scores next to nothing, because every one of them is about to be used.

Both are of one sequence: stretches must not run from one text into another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
WINDOWS = (4, 16, 64, 256)
NOBODY = -1


@dataclass(frozen=True, kw_only=True)
class SegmentRouting:
    """The best F1 score of a threshold, that threshold, and how many experts it guesses for each that a token uses."""

    f1: float
    threshold: int
    size: float


def segment_routing(expert_TLK: ArrayLike, num_experts: int, windows: Sequence[int] = WINDOWS) -> list[SegmentRouting]:
    """SRP of a sequence for windows of m tokens, at every position; experts of all layers share one threshold.

    expert_TLK: the experts that each token chose in each layer, -1 for a choice not made. For one layer, [T, 1, K].
    """
    used_TLE = _used(expert_TLK, num_experts)
    _require_windows(windows, len(used_TLE))
    return [best_threshold(uses_of(used_TLE, window).sum(axis=(0, 1))) for window in windows]


def segment_routing_LE(expert_TLK: ArrayLike, num_experts: int, window: int) -> FloatArray:
    """SRP of every expert alone, each at the threshold that is best for it; 0 for one never used. -> f1_LE."""
    used_TLE = _used(expert_TLK, num_experts)
    _require_windows((window,), len(used_TLE))
    f1_LEC = _f1(uses_of(used_TLE, window))
    best_LE: FloatArray = f1_LEC.max(axis=-1)
    return best_LE


def uses_of(used_TLE: NDArray[np.bool_], window: int) -> IntArray:
    """At how many positions does a window hold exactly c tokens that use an expert, c = 0 to window? -> [L, E, c].

    used_TLE: which token uses which expert.
    """
    tokens, layers, num_experts = used_TLE.shape
    uses_LEC = np.zeros((layers, num_experts, window + 1), dtype=np.int64)
    for layer in range(layers):
        before_TE = np.zeros((tokens + 1, num_experts), dtype=np.int64)
        np.cumsum(used_TLE[:, layer], axis=0, out=before_TE[1:])
        count_WE = before_TE[window:] - before_TE[:-window]
        cell_WE = count_WE + np.arange(num_experts) * (window + 1)
        uses_LEC[layer] = np.bincount(cell_WE.ravel(), minlength=uses_LEC[layer].size).reshape(num_experts, -1)
    return uses_LEC


def best_threshold(mass_C: ArrayLike) -> SegmentRouting:
    """SRP from how often, or with what probability, an expert is used c times in a window of len(mass_C) - 1 tokens.

    F1(t) = 2 S / (m N + A), where N windows have c >= t, S uses fall into those, and A uses there are.
    """
    mass_C = np.asarray(mass_C, dtype=np.float64)
    if mass_C.ndim != 1 or len(mass_C) < 2 or not (np.isfinite(mass_C).all() and mass_C.min() >= 0):
        raise ValueError(f"mass_C needs numbers >= 0 for c = 0, 1, ... window; got shape {mass_C.shape}")
    window, uses = len(mass_C) - 1, float(mass_C @ np.arange(len(mass_C)))
    if uses == 0:
        raise ValueError("no token uses an expert; a sequence needs at least one choice")
    f1_C = _f1(mass_C)
    threshold = int(f1_C.argmax())
    size = window * float(mass_C[threshold:].sum()) / uses
    return SegmentRouting(f1=float(f1_C[threshold]), threshold=threshold, size=size)


def cache_hits(
    expert_TLK: ArrayLike, num_experts: int, caches: Sequence[int], windows: Sequence[int] = WINDOWS
) -> FloatArray:
    """SCH of each window m, layer and cache size C; each layer has a cache of its own. -> hit share [window, L, cache].

    A token's choices are looked up all at once, then taken in one by one, in the order they are given; the choices it
    still has to make count as its future. Of those used least, the one used longest ago leaves. The first use of an
    expert is a hit while the cache has a free place: it has to be loaded once wherever it is.
    """
    expert_TLK = _choices(expert_TLK, num_experts)
    used_TLE = _used(expert_TLK, num_experts)
    _require_windows(windows, len(used_TLE))
    if not caches or min(caches) < 1:
        raise ValueError(f"a cache holds at least one expert; got caches {list(caches)}")
    made_L = (expert_TLK != NOBODY).sum(axis=(0, 2))
    if made_L.min() == 0:
        raise ValueError(f"layer {int(made_L.argmin())} has no choice; leave it out")
    tokens, layers, _ = expert_TLK.shape
    place_C, window_W = np.asarray(caches), np.asarray(windows)
    before_TLE = np.zeros((tokens + 1, layers, num_experts), dtype=np.int64)
    np.cumsum(used_TLE, axis=0, out=before_TLE[1:])
    cached_WLCE = np.zeros((len(window_W), layers, len(place_C), num_experts), dtype=np.bool_)
    hits_WLC = np.zeros(cached_WLCE.shape[:3], dtype=np.int64)
    last_LE = np.full((layers, num_experts), -1)
    # An eviction's key is the coming uses first and the time of the last use second.
    later, never = tokens * expert_TLK.shape[2] + 1, np.iinfo(np.int64).max
    for token, expert_LK in enumerate(expert_TLK):
        hits_WLC += _looked_up(expert_LK, cached_WLCE, last_LE, place_C)
        ahead_WLE = before_TLE[np.minimum(token + window_W, tokens)] - before_TLE[token]
        for choice, expert_L in enumerate(expert_LK.T):
            layer_N = np.flatnonzero(expert_L != NOBODY)
            expert_N = expert_L[layer_N]
            ahead_WLE[:, layer_N, expert_N] -= 1
            last_LE[layer_N, expert_N] = token * expert_LK.shape[1] + choice
            miss_WNC = ~cached_WLCE[:, layer_N, :, expert_N].transpose(1, 0, 2)
            full_WNC = cached_WLCE[:, layer_N].sum(axis=-1) >= place_C
            window_M, row_M, cache_M = np.nonzero(miss_WNC & full_WNC)
            layer_M = layer_N[row_M]
            key_ME = ahead_WLE[window_M, layer_M] * later + last_LE[layer_M]
            key_ME = np.where(cached_WLCE[window_M, layer_M, cache_M], key_ME, never)
            cached_WLCE[window_M, layer_M, cache_M, key_ME.argmin(axis=-1)] = False
            cached_WLCE[:, layer_N, :, expert_N] = True
    share_WLC: FloatArray = hits_WLC / made_L[:, None]
    return share_WLC


def _looked_up(expert_LK: IntArray, cached_WLCE: NDArray[np.bool_], last_LE: IntArray, place_C: IntArray) -> IntArray:
    """Hits of one token's choices, before any of them is taken in."""
    layers = len(expert_LK)
    made_LK = expert_LK != NOBODY
    new_LK = made_LK & (np.take_along_axis(last_LE, np.maximum(expert_LK, 0), axis=1) < 0)
    # Experts seen before this choice: those of earlier tokens, and the new ones of this token that come first.
    seen_LK = (last_LE >= 0).sum(axis=1, keepdims=True) + new_LK.cumsum(axis=1) - new_LK
    free_LCK = new_LK[:, None] & (seen_LK[:, None] < place_C[:, None])
    layer_LK = np.arange(layers)[:, None]
    cached_WLCK = cached_WLCE[:, layer_LK, :, expert_LK].transpose(2, 0, 3, 1) & made_LK[:, None]
    hits_WLC: IntArray = (cached_WLCK | free_LCK).sum(axis=-1)
    return hits_WLC


def _f1(mass_C: NDArray[np.float64] | IntArray) -> FloatArray:
    """F1 of every threshold t = 0 to window. [..., c] -> [..., t]; 0 where nothing is used."""
    window = mass_C.shape[-1] - 1
    above_C = mass_C[..., ::-1].cumsum(axis=-1)[..., ::-1]
    caught_C = (mass_C * np.arange(window + 1))[..., ::-1].cumsum(axis=-1)[..., ::-1]
    most_C = window * above_C + caught_C[..., :1]
    f1_C: FloatArray = 2 * caught_C / np.where(most_C > 0, most_C, 1)
    return f1_C


def _choices(expert_TLK: ArrayLike, num_experts: int) -> IntArray:
    try:
        choices = np.asarray(expert_TLK)
    except ValueError:
        raise ValueError("expert_TLK must be a table [tokens, layers, choices], every row of one length") from None
    if choices.ndim != 3 or 0 in choices.shape or choices.dtype.kind not in "iu":
        raise ValueError(
            f"expert_TLK must be whole numbers [tokens, layers, choices]; got {choices.dtype} of shape "
            f"{choices.shape}; for one layer give expert_TK[:, None]"
        )
    choices = choices.astype(np.int64)
    if not NOBODY <= choices.min() <= choices.max() < num_experts:
        raise ValueError(
            f"expert_TLK holds {choices.min()} to {choices.max()}; use an expert's number below {num_experts}, "
            f"or -1 for a choice not made"
        )
    ordered = np.sort(choices, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NOBODY)
    if twice.any():
        token, layer, _ = np.argwhere(twice)[0].tolist()
        raise ValueError(f"token {token} chose an expert of layer {layer} twice; a token uses an expert once")
    return choices


def _used(expert_TLK: ArrayLike, num_experts: int) -> NDArray[np.bool_]:
    choices = _choices(expert_TLK, num_experts)
    used_TLE = np.zeros((*choices.shape[:2], num_experts), dtype=np.bool_)
    token_N, layer_N, choice_N = np.nonzero(choices != NOBODY)
    used_TLE[token_N, layer_N, choices[token_N, layer_N, choice_N]] = True
    return used_TLE


def _require_windows(windows: Sequence[int], tokens: int) -> None:
    if not windows or min(windows) < 1 or max(windows) > tokens:
        raise ValueError(f"windows {list(windows)} do not fit a sequence of {tokens} tokens; use 1 to {tokens}")
