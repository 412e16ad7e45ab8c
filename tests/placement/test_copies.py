from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import LoadTrace, Topology
from placement.copies import apportion, copies_fit, thinning_C
from tests.placement.strategies import loads, topologies

pytestmark = pytest.mark.fast


def greedy(load_E: np.ndarray, slots: int, most: int) -> np.ndarray:
    copies_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(slots - len(load_E)):
        each_E = np.where(copies_E < most, load_E / copies_E, -1.0)
        copies_E[each_E.argmax()] += 1
    return copies_E


def test_the_closed_form_is_as_good_as_giving_copies_one_by_one() -> None:
    random = np.random.default_rng(0)
    for trial in range(1000):
        experts, ranks = int(random.integers(1, 30)), int(random.integers(1, 9))
        load_E = random.integers(0, [4, 50, 10**6][trial % 3], experts).astype(np.float64)
        slots = -(-experts // ranks) + int(random.integers(0, 4))
        topology = Topology.even(ranks=ranks, slots=slots, ranks_per_node=ranks)
        copies_E = apportion(load_E[None], topology)[0]
        expected_E = greedy(load_E, min(ranks * slots, experts * ranks), ranks)
        assert copies_E.sum() == expected_E.sum()
        assert (load_E / copies_E).max() == (load_E / expected_E).max()


@given(st.data())
def test_copies_use_the_slots_and_can_be_placed_on_distinct_ranks(data: st.DataObject) -> None:
    trace = data.draw(loads())
    topology = data.draw(topologies(trace.num_experts))
    copies_LE = apportion(trace.load_LE, topology)
    ranks = sum(slots > 0 for slots in topology.slots_R)
    assert (copies_LE >= 1).all()
    assert (copies_LE <= ranks).all()
    assert (copies_LE.sum(axis=1) <= topology.slots).all()
    assert copies_fit(copies_LE, topology)


def test_a_slow_rank_makes_a_second_copy_thin_less() -> None:
    topology = Topology(slots_R=(1, 1, 0), ranks_per_node=3, speed_R=(1.0, 0.5, 9.0))
    np.testing.assert_allclose(thinning_C(topology), [1.0, 1.0])
    even = Topology.even(ranks=3, slots=1, ranks_per_node=3)
    np.testing.assert_allclose(thinning_C(even), [1, 1 / 2, 1 / 3])


def test_too_few_slots_say_how_many_are_needed() -> None:
    with pytest.raises(ValueError, match="5 experts do not fit 2 ranks with 4 slots in all; use slots >= 3 a rank"):
        apportion(np.ones((1, 5)), Topology.even(ranks=2, slots=2, ranks_per_node=2))


def test_ties_go_to_the_lowest_expert() -> None:
    trace = LoadTrace(load_WLE=np.full((1, 1, 4), 7.0))
    copies_LE = apportion(trace.load_LE, Topology.even(ranks=3, slots=2, ranks_per_node=3))
    np.testing.assert_array_equal(copies_LE, [[2, 2, 1, 1]])
