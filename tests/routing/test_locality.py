"""SRP and SCH against slow, literal definitions, and against numbers worked out for independent choices."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from routing.locality import (
    WINDOWS,
    SegmentRouting,
    best_threshold,
    cache_hits,
    segment_routing,
    segment_routing_LE,
)
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
IntArray = NDArray[np.int64]


@st.composite
def sequences(draw: st.DrawFn, gaps: bool = True) -> tuple[IntArray, int]:
    """expert_TLK of a token's distinct experts, some choices not made, and the number of experts."""
    experts, layers, tokens = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(4, 24))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    taste = draw(st.floats(0, 3)) * rng.standard_normal(experts)
    expert_TLK = np.argsort(-taste - rng.gumbel(size=(tokens, layers, experts)), axis=-1)[..., :top_k]
    if gaps:
        expert_TLK[rng.random(expert_TLK.shape) < draw(st.sampled_from([0.0, 0.2]))] = -1
        expert_TLK[0, :, 0] = 0
        expert_TLK[0, :, 1:] = -1
    return expert_TLK, experts


def random_choices(tokens: int, layers: int, experts: int, top_k: int) -> IntArray:
    return np.random.default_rng(0).random((tokens, layers, experts)).argsort(axis=-1)[..., :top_k]


def literal_f1(expert_TLK: IntArray, layer: int, experts: range, window: int, threshold: int) -> float:
    """F1 of loading, for each window, whoever is used at least so often in it: true, guessed and actual, counted."""
    right, guessed, actual = 0, 0, 0
    for start in range(len(expert_TLK) - window + 1):
        segment = [set(token[layer].tolist()) for token in expert_TLK[start : start + window]]
        for expert in experts:
            uses = sum(expert in token for token in segment)
            actual += uses
            if uses >= threshold:
                right, guessed = right + uses, guessed + window
    return 2 * right / (guessed + actual) if actual else 0.0


@LAW
@given(sequences(), st.integers(1, 4))
def test_srp_of_an_expert_and_of_a_layer_is_the_f1_score_at_its_best_threshold(
    sequence: tuple[IntArray, int], window: int
) -> None:
    expert_TLK, experts = sequence
    f1_LE = segment_routing_LE(expert_TLK, experts, window)
    for layer in range(expert_TLK.shape[1]):
        found = segment_routing(expert_TLK[:, [layer]], experts, [window])[0]
        scores = [literal_f1(expert_TLK, layer, range(experts), window, t) for t in range(window + 1)]
        assert found.f1 == pytest.approx(max(scores))
        assert scores[found.threshold] == pytest.approx(max(scores))
        alone = range(experts - 1, experts)
        best = max(literal_f1(expert_TLK, layer, alone, window, t) for t in range(window + 1))
        assert f1_LE[layer, -1] == pytest.approx(best)


def test_srp_of_independent_choices_is_what_the_binomial_says() -> None:
    expected = (0.4640, 0.3214, 0.2526, 0.2294)
    exact = [best_threshold([math.comb(m, c) * 0.125**c * 0.875 ** (m - c) for c in range(m + 1)]).f1 for m in WINDOWS]
    assert exact == pytest.approx(expected, abs=5e-5)
    sampled = segment_routing(random_choices(20_000, 1, 64, 8), 64)
    assert [found.f1 for found in sampled] == pytest.approx(expected, abs=1e-3)
    assert sampled[0].size == pytest.approx(3.31, abs=0.01)


def test_layers_share_one_threshold() -> None:
    """Two layers, one always at its experts and one at random: the threshold must suit both."""
    still_TLK = np.tile(np.arange(2), (400, 1, 1))
    both_TLK = np.concatenate([still_TLK, random_choices(400, 1, 16, 2)], axis=1)
    alone = [segment_routing(both_TLK[:, [layer]], 16, [16])[0] for layer in (0, 1)]
    assert alone[0] == SegmentRouting(f1=1.0, threshold=1, size=1.0)
    together = segment_routing(both_TLK, 16, [16])[0]
    assert alone[1].f1 < together.f1 < 1
    assert together.threshold > alone[0].threshold


def literal_hits(token_of: list[list[int]], window: int, places: int) -> float:
    """One layer, one cache, token by token: who is in the cache, who leaves it, who comes."""
    cache: list[int] = []
    last_use: dict[int, int] = {}
    hits = uses = 0
    for now, experts in enumerate(token_of):
        inside, known = set(cache), set(last_use)
        for expert in experts:
            if expert in inside:
                hits += 1
            elif expert not in known:
                hits += len(known) < places
                known.add(expert)
        for index, expert in enumerate(experts):
            uses += 1
            last_use[expert] = uses
            if expert in cache:
                continue
            if len(cache) == places:
                coming = [*experts[index + 1 :], *(e for token in token_of[now + 1 : now + window] for e in token)]
                cache.remove(min(cache, key=lambda held: (coming.count(held), last_use[held])))
            cache.append(expert)
    return hits / uses


@LAW
@given(sequences(), st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
def test_sch_is_a_cache_followed_token_by_token(sequence: tuple[IntArray, int], windows: list[int]) -> None:
    expert_TLK, experts = sequence
    caches = range(1, experts + 1)
    share_WLC = cache_hits(expert_TLK, experts, caches, windows)
    assert share_WLC.shape == (len(windows), expert_TLK.shape[1], experts)
    for layer in range(expert_TLK.shape[1]):
        token_of = [[e for e in token[layer].tolist() if e >= 0] for token in expert_TLK]
        for row, window in enumerate(windows):
            expected = [literal_hits(token_of, window, places) for places in caches]
            assert share_WLC[row, layer].tolist() == pytest.approx(expected)


@LAW
@given(sequences())
def test_a_cache_of_all_experts_hits_always_and_a_larger_one_no_less(sequence: tuple[IntArray, int]) -> None:
    expert_TLK, experts = sequence
    share_WLC = cache_hits(expert_TLK, experts, range(1, experts + 1), [1, 4])
    assert (share_WLC[..., -1] == 1).all()
    assert all((after >= before).all() for before, after in pairwise(np.moveaxis(share_WLC, -1, 0)))


@pytest.mark.parametrize("places", [2, 3, 8])
def test_constant_routing_hits_always_once_the_cache_holds_a_token(places: int) -> None:
    assert (cache_hits(np.tile([3, 5], (300, 2, 1)), 8, [places]) == 1).all()


def test_a_cycle_through_a_cache_one_too_small_scores_next_to_nothing() -> None:
    """The best cache would keep two of the four and hit half the time; this one must take in whoever comes."""
    cycle_TLK = (np.arange(400) % 4)[:, None, None]
    assert cache_hits(cycle_TLK, 8, [3], [16]).item() == pytest.approx(0.0275)
    assert cache_hits(cycle_TLK, 8, [4], [16]).item() == 1


def test_what_cannot_be_is_refused() -> None:
    good_TLK = random_choices(8, 1, 4, 2)
    cases = {
        r"windows \[4, 16, 64, 256\] do not fit a sequence of 8": lambda: segment_routing(good_TLK, 4),
        "windows .0. do not fit": lambda: cache_hits(good_TLK, 4, [2], [0]),
        "number below 3": lambda: segment_routing(good_TLK, 3, [2]),
        r"expert_TK\[:, None\]": lambda: segment_routing(good_TLK[:, 0], 4, [2]),
        "whole numbers": lambda: cache_hits(good_TLK + 0.5, 4, [2], [2]),
        "of one length": lambda: segment_routing([[[1]], [[1, 2]]], 4, [2]),
        "token 1 chose": lambda: segment_routing([[[1, 2]], [[1, 1]]], 4, [2]),
        "at least one expert": lambda: cache_hits(good_TLK, 4, [0], [2]),
        "layer 0 has no choice": lambda: cache_hits(np.full((8, 1, 2), -1), 4, [1], [2]),
        "no token uses": lambda: segment_routing(np.full((8, 1, 2), -1), 4, [2]),
        "mass_C needs": lambda: best_threshold([0.5, -0.5]),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
