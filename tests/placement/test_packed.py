"""Packed and RoundRobin: the planners' contract, the published instances, and refinement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import LoadTrace, Packed, Planner, RoundRobin, Topology
from placement.bounds import peak_bound_L
from placement.copies import apportion
from placement.metrics import peak_over_mean
from placement.packing import pack, placements
from placement.refine import rank_time, refine_swaps
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import drawn_loads, loads, topologies

README = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


@pytest.mark.parametrize("planner", [RoundRobin(), Packed()])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_planners_keep_their_contract(planner: Planner, data: st.DataObject) -> None:
    trace = data.draw(loads())
    assert_keeps_the_planner_contract(planner, trace, data.draw(topologies(trace.num_experts)))


def test_the_eplb_readme_is_solved_to_its_flat_optimum() -> None:
    trace = LoadTrace(load_WLE=np.array([README]))
    plan = Packed()(trace, Topology.even(ranks=8, slots=2, ranks_per_node=4))
    mean_L = trace.load_LE.sum(axis=1) / 8
    peak_L = [certificate.peak_over_mean for certificate in plan.certificate_L] * mean_L
    np.testing.assert_allclose(peak_L, [136, 172])
    assert all(c.bound * mean <= peak for c, mean, peak in zip(plan.certificate_L, mean_L, (136, 172), strict=True))


def test_the_flashlb_example_is_solved_to_its_optimum() -> None:
    load_E = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    plan = Packed()(LoadTrace(load_WLE=load_E[None, None]), Topology.even(ranks=8, slots=2, ranks_per_node=8))
    assert plan.certificate_L[0].peak_over_mean * load_E.sum() / 8 <= 196.667 + 1e-3


def test_288_slots_on_64_ranks_are_dealt_unevenly_and_balance() -> None:
    trace = drawn_loads(0, layers=6, experts=256)
    topology = Topology.fitting(num_experts=256, ranks=64, ranks_per_node=8, spare=32)
    assert sorted(topology.slots_R) == [4] * 32 + [5] * 32
    plan = assert_keeps_the_planner_contract(Packed(), trace, topology)
    assert max(certificate.peak_over_mean for certificate in plan.certificate_L) <= 1.05


@pytest.mark.parametrize("ranks, most", [(32, 1.001), (64, 1.005), (72, 1.01)])
def test_plans_of_a_large_model_are_close_to_their_bound(ranks: int, most: float) -> None:
    trace = drawn_loads(1, layers=4, experts=256, spread=0.6)
    spare = {64: 64}.get(ranks, 32)
    plan = Packed()(trace, Topology.fitting(num_experts=256, ranks=ranks, ranks_per_node=8, spare=spare))
    assert np.mean([certificate.peak_over_mean for certificate in plan.certificate_L]) <= most


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packing_never_puts_an_expert_twice_on_a_rank_even_where_greedy_gets_stuck(data: st.DataObject) -> None:
    trace = data.draw(loads())
    topology = data.draw(topologies(trace.num_experts))
    copies_LE = apportion(trace.load_LE, topology)
    for placement, copies_E in zip(
        placements(pack(copies_LE, trace.load_LE[:, None], topology)), copies_LE, strict=True
    ):
        np.testing.assert_array_equal(placement.copies_E, copies_E)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_swaps_never_raise_the_peak_nor_change_who_has_how_many_copies(data: st.DataObject) -> None:
    trace = data.draw(loads())
    topology = data.draw(topologies(trace.num_experts))
    table = pack(apportion(trace.load_LE, topology), trace.load_LE[:, None, ::-1], topology)
    better = refine_swaps(table, trace.load_LE, topology, np.zeros(trace.layers))
    before, after = (rank_time(t, trace.load_LE, topology).max(axis=1) for t in (table, better))
    assert (after <= before * (1 + 1e-9)).all()
    for old, new in zip(placements(table), placements(better), strict=True):
        np.testing.assert_array_equal(old.copies_E, new.copies_E)


@pytest.mark.fast
@pytest.mark.parametrize("slots_R, speed_R", [((8,) * 8, (0.25, *(1.0,) * 7)), ((36, *(4,) * 7), (1.0,) * 8)])
def test_a_slow_or_roomy_rank_that_must_be_full_binds_the_bound(
    slots_R: tuple[int, ...], speed_R: tuple[float, ...]
) -> None:
    trace = drawn_loads(0, layers=2, experts=64)
    topology = Topology(slots_R=slots_R, ranks_per_node=8, speed_R=speed_R)
    least_L = np.sort(trace.load_LE, axis=1)[:, : slots_R[0]].sum(axis=1) / speed_R[0]
    bound_L = peak_bound_L(trace.load_LE, topology)
    assert (bound_L >= least_L / (trace.load_LE.sum(axis=1) / sum(speed_R)) * (1 - 1e-12)).all()
    assert all(certificate.gap < 0.02 for certificate in Packed()(trace, topology).certificate_L)


@pytest.mark.fast
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_no_placement_whatever_is_below_the_bound(data: st.DataObject) -> None:
    """Every placement of a small layer, by brute force: each rank holds any set of experts that its slots allow."""
    trace = data.draw(loads(layers=1, most_experts=4))
    topology = data.draw(topologies(trace.num_experts).filter(lambda t: t.ranks <= 3))
    load_E, speed_R = trace.load_LE[0], np.array(topology.speed_R)
    sets = [
        [s for n in range(slots + 1) for s in itertools.combinations(range(len(load_E)), n)]
        for slots in topology.slots_R
    ]
    best = np.inf
    for held in itertools.product(*sets):
        held_RE = np.array([[e in rank for e in range(len(load_E))] for rank in held], dtype=np.float64)
        if held_RE.any(axis=0).all():
            best = min(best, float(peak_over_mean(held_RE @ (load_E / held_RE.sum(axis=0)), speed_R)))
    assert peak_bound_L(load_E[None], topology)[0] <= best * (1 + 1e-9)
