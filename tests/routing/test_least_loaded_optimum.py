"""LeastLoaded against the optimum: an exact solver counts the fewest visits that reach the same capacity."""

from __future__ import annotations

import numpy as np
import pytest

from placement import Placement
from routing import LeastLoaded
from tests.routing.batches import at_homes, contiguous, zipf
from tests.routing.milp import fewest_visits, fewest_visits_by_trying


def visits_and_optimum(planner: LeastLoaded, count_RE: np.ndarray, placement: Placement) -> tuple[int, int | None]:
    load_E, ranks = count_RE.sum(axis=0), placement.ranks
    capacity = planner.capacity(int(load_E.sum()), ranks)
    decided = planner(count_RE, placement)
    assert decided.load_R.max() <= capacity, "only plans that reach the same capacity can be compared"
    return len(decided.loans(placement)), fewest_visits(load_E, placement.home_E, ranks, capacity)


@pytest.mark.parametrize("headroom", [1.0, 1.05, 1.2])
def test_visits_are_within_a_tenth_of_the_optimum_on_average(headroom: float) -> None:
    planner = LeastLoaded(headroom=headroom)
    visits, optima = [], []
    for num_experts, ranks in ((16, 4), (32, 4), (21, 6), (32, 8)):
        for seed, exponent in enumerate([0.5, 0.8, 1.0, 1.2] * 3):
            count_RE = zipf(num_experts, ranks, exponent, seed)
            made, optimum = visits_and_optimum(planner, count_RE, contiguous(num_experts, ranks))
            if optimum is not None:
                assert made >= optimum, f"the solver missed a plan: E={num_experts} R={ranks} {exponent=} {seed=}"
                visits.append(made)
                optima.append(optimum)
    assert len(optima) >= 36, "too few optima were proven in time to speak of an average"
    assert sum(optima) > 0
    assert sum(visits) <= 1.1 * sum(optima), f"{sum(visits)} visits, {sum(optima)} at best"


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.2])
def test_ragged_batches_cost_at_most_one_visit_more_than_the_optimum(exponent: float) -> None:
    planner, placement, proven = LeastLoaded(headroom=1.0), contiguous(32, 8), 0
    for seed in (*range(10), 115, 118):  # the last two once cost two visits more
        count_RE = zipf(32, 8, exponent, seed, ragged=True)
        count_RE[0, 0] += count_RE.sum() % 8 == 0
        assert count_RE.sum() % 8, "a ragged batch does not divide"
        made, optimum = visits_and_optimum(planner, count_RE, placement)
        if optimum is not None:
            proven += 1
            assert made <= optimum + 1, f"seed {seed}: {made} visits, {optimum} at best"
    assert proven >= 9, "too few optima were proven in time"


@pytest.mark.parametrize("seed", [*range(60), 197])
def test_the_bounds_cut_off_no_plan(seed: int) -> None:
    """The yardstick itself, against trying all sets of visits. (In 197 the optimum is above both bounds.)"""
    rng = np.random.default_rng(seed)
    ranks, experts = int(rng.integers(2, 5)), int(rng.integers(2, 6))
    home_E = at_homes(rng.integers(0, ranks, experts).tolist(), ranks).home_E
    load_E = rng.integers(0, 8, experts)
    capacity = int(-(-load_E.sum() // ranks)) + int(rng.integers(0, 2))
    assert fewest_visits(load_E, home_E, ranks, capacity) == fewest_visits_by_trying(load_E, home_E, ranks, capacity)
