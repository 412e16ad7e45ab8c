"""Slots that are better left empty, and machines on which more slots must not hurt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import LoadTrace, Packed, Plan, RoundRobin, Topology
from placement.metrics import peak_over_mean_L
from placement.packing import working_table
from placement.risk import risk
from placement.robust import Robust, scenario_peaks
from tests.placement.strategies import drawn_loads, loads, topologies


@pytest.mark.parametrize("planner", [Packed(), Robust()])
@pytest.mark.parametrize(
    "load_E, slots_R, speed_R, optimum",
    [
        ((1.461, 8.346, 6.921), (3, 1), (1.0, 1.0), 1.0023),
        ((0.276, 0.12), (2, 2, 2), (2.0, 2.0, 0.5), 1.0115),
    ],
)
def test_a_copy_that_burdens_its_rank_is_left_out(
    planner: Packed | Robust,
    load_E: tuple[float, ...],
    slots_R: tuple[int, ...],
    speed_R: tuple[float, ...],
    optimum: float,
) -> None:
    topology = Topology(slots_R=slots_R, ranks_per_node=len(slots_R), speed_R=speed_R)
    (certificate,) = planner(LoadTrace(load_WLE=np.array([[load_E]])), topology).certificate_L
    assert certificate.peak_over_mean <= optimum


@pytest.mark.parametrize("planner", [Packed(), Robust()])
def test_more_slots_do_not_hurt_beside_a_slow_rank(planner: Packed | Robust) -> None:
    trace = drawn_loads(3, windows=4, layers=3, experts=64)
    machine = Topology(slots_R=(8,) * 8, ranks_per_node=8, speed_R=(0.25, *(1.0,) * 7))
    peaks = [value_L(planner, trace, replace(machine, slots_R=(slots,) * 8)) for slots in (8, 9, 12)]
    assert (peaks[1] <= peaks[0] * 1.001).all()
    assert (peaks[2] <= peaks[1] * 1.001).all()


@given(st.data(), st.sampled_from([Packed(), Robust(tail=0.0), Robust(tail=1.0)]))
@settings(max_examples=20)
def test_no_layer_is_worse_than_dealt_like_cards_nor_than_with_fewer_slots(
    data: st.DataObject, planner: Packed | Robust
) -> None:
    trace = data.draw(loads(windows=2))
    topology = data.draw(topologies(trace.num_experts))
    value = value_L(planner, trace, topology)
    robust = planner if isinstance(planner, Robust) else Robust(tail=1.0, most_scenarios=1)
    assert (value <= plan_value_L(RoundRobin()(trace, topology), robust, trace, topology) * (1 + 1e-9)).all()
    more = replace(topology, slots_R=(max(topology.slots_R) + 1,) * topology.ranks)
    even = replace(topology, slots_R=(max(topology.slots_R),) * topology.ranks)
    assert (value_L(planner, trace, more) <= value_L(planner, trace, even) * (1 + 7e-3)).all()


def value_L(planner: Packed | Robust, trace: LoadTrace, topology: Topology) -> np.ndarray:
    """The planner's own objective."""
    plan = planner(trace, topology)
    if isinstance(planner, Packed):
        return peak_over_mean_L(plan, trace.load_LE, topology)
    return plan_value_L(plan, planner, trace, topology)


def plan_value_L(plan: Plan, planner: Robust, trace: LoadTrace, topology: Topology) -> np.ndarray:
    table = working_table(plan.placement_L, topology)
    if planner.most_scenarios == 1:
        return peak_over_mean_L(plan, trace.load_LE, topology)
    return risk(scenario_peaks(table, planner.loads(trace, topology), topology), planner.tail)
