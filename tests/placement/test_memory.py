"""Memory by rank: whoever plans keeps to it, and says in one way where it is too small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placement import (
    Affinity,
    Ilp,
    IlpWhole,
    LoadTrace,
    Packed,
    Placement,
    Planner,
    PricedGroups,
    Rebalance,
    Robust,
    RoundRobin,
    StrictGroups,
    Topology,
)
from placement.plan import EMPTY
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import choices

EXPERT_BYTES = 10
# Planners for a number of experts.
PLANNERS: dict[str, Callable[[int], Planner]] = {
    "round-robin": lambda _: RoundRobin(),
    "packed": lambda _: Packed(),
    "robust": lambda _: Robust(),
    "affinity": lambda _: Affinity(restarts=2, rounds=0),
    "affinity under a cap": lambda _: Affinity(balance_cap=20.0, most_scenarios=2, restarts=2, rounds=0),
    "ilp": lambda _: Ilp(),
    "ilp under a cap": lambda _: Ilp(balance_cap=20.0),
    "whole ilp": lambda _: IlpWhole(),
    "priced groups": lambda experts: PricedGroups(groups=experts),
    "strict groups": lambda experts: StrictGroups(groups=experts),
}
named = pytest.mark.parametrize("name", PLANNERS)


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """Slots, and memory that binds on most ranks, a bit more than whole experts."""
    ranks = draw(st.integers(1, 4))
    slots_R, held_R = (draw(st.tuples(*[st.integers(0, most)] * ranks)) for most in (4, 2))
    memory_R = tuple(EXPERT_BYTES * held + draw(st.integers(0, EXPERT_BYTES - 1)) for held in held_R)
    nodes = draw(st.integers(1, ranks))
    return Topology(slots_R=slots_R, ranks_per_node=nodes, memory_R=memory_R, expert_bytes=EXPERT_BYTES)


@named
@given(machine=machines(), seed=st.integers(0, 9), data=st.data())
@settings(max_examples=6, deadline=None)
def test_no_rank_is_given_more_experts_than_its_memory_holds(
    name: str, machine: Topology, seed: int, data: st.DataObject
) -> None:
    assume(machine.slots >= 2)
    experts = machine.slots if name == "whole ilp" else data.draw(st.integers(2, machine.slots))
    planner = PLANNERS[name](experts)
    trace = choices(seed, tokens=20, layers=2, experts=experts, top_k=1).windowed(10)
    plan = assert_keeps_the_planner_contract(planner, trace, machine)
    assert_fits(plan.placement_L, machine)
    again = Rebalance(start=plan, most_moves=4)(LoadTrace(load_WLE=trace.load_WLE[:, :, ::-1]), machine)
    assert_fits(again.placement_L, machine)
    # Memory is slots by another name: the same machine with as few slots gets the same plan.
    assert planner(trace, replace(machine, memory_R=(), expert_bytes=0)).fingerprint == plan.fingerprint


def assert_fits(placement_L: tuple[Placement, ...], machine: Topology) -> None:
    for placement in placement_L:
        held_R = (placement.expert_RS != EMPTY).sum(axis=1)
        assert (held_R * EXPERT_BYTES <= np.array(machine.memory_R)).all()


@named
@given(machine=machines(), more=st.integers(2, 4))
@settings(max_examples=6, deadline=None)
def test_memory_that_is_too_small_is_one_clear_error(name: str, machine: Topology, more: int) -> None:
    experts = machine.slots + more
    trace = choices(0, tokens=20, layers=2, experts=experts, top_k=1)
    message = (
        f"^{experts} experts do not fit {machine.ranks} ranks with {machine.slots} slots in all, where no rank has "
        f"more slots than its memory holds experts of 10 bytes; use more ranks, memory or slots$"
    )
    start = RoundRobin()(trace, Topology.even(ranks=machine.ranks, slots=experts, ranks_per_node=1))
    for planner in (PLANNERS[name](experts), Rebalance(start=start, most_moves=4)):
        with pytest.raises(ValueError, match=message):
            planner(trace, machine)


def test_a_plan_that_memory_has_no_more_room_for_says_so() -> None:
    trace = choices(0, tokens=20, layers=2, experts=6, top_k=2)
    start = RoundRobin()(trace, Topology.even(ranks=2, slots=3, ranks_per_node=1))
    smaller = Topology(slots_R=(6, 6), ranks_per_node=1, memory_R=(60, 25), expert_bytes=EXPERT_BYTES)
    with pytest.raises(ValueError, match="layer 0 puts 3 experts on rank 1 of 2 slots, as its memory holds 2"):
        Rebalance(start=start, most_moves=4)(trace, smaller)
