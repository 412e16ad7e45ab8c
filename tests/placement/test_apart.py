"""Apart deals ranks to nodes so that load finds its expert there; which experts share a rank stays as it is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import LoadTrace, Packed, Robust, Topology
from placement.apart import FloatArray, IntArray, apart

pytestmark = pytest.mark.fast
Case = tuple[IntArray, FloatArray, Topology]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tables with copies, on ranks of up to two speeds."""
    ranks, slots, experts = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(4, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [rng.permutation(experts)[:slots] for _ in range(ranks)]
    load_LE = rng.lognormal(0, 1, (1, experts)) * rng.integers(0, 2, (1, experts))
    speed_R = tuple(rng.choice([1.0, draw(st.sampled_from([1.0, 2.0]))], ranks).tolist())
    topology = Topology(slots_R=(slots,) * ranks, ranks_per_node=draw(st.integers(1, 3)), speed_R=speed_R)
    return np.stack(rows)[None], load_LE, topology


@settings(max_examples=200)
@given(cases())
def test_ranks_of_a_kind_trade_places_and_no_swap_would_bring_more_load_home(case: Case) -> None:
    table, load_LE, topology = case
    dealt = apart(table, load_LE, topology)
    for speed in set(topology.speed_R):
        alike = [rank for rank, other in enumerate(topology.speed_R) if other == speed]
        assert sorted(map(tuple, dealt[0, alike])) == sorted(map(tuple, table[0, alike]))
    reached = at_home(dealt, load_LE, topology)
    assert reached >= at_home(table, load_LE, topology) - 1e-9
    for one, other in combinations(range(topology.ranks), 2):
        if topology.speed_R[one] == topology.speed_R[other]:
            swapped = dealt.copy()
            swapped[0, [one, other]] = dealt[0, [other, one]]
            assert at_home(swapped, load_LE, topology) <= reached + 1e-6 * load_LE.sum()


def at_home(table: IntArray, load_LE: FloatArray, topology: Topology) -> float:
    """The load that finds its expert on its own node, if it comes from all nodes alike."""
    node_R = np.array(topology.node_R)
    held = [set(table[0, node_R == node].ravel().tolist()) for node in range(node_R.max() + 1)]
    return sum(float(load_LE[0, sorted(experts)].sum()) for experts in held) / len(held)


@pytest.mark.parametrize("planner", [Packed(), Robust()], ids=repr)
def test_a_plan_that_knows_its_nodes_is_as_balanced_as_one_that_does_not(planner: Packed | Robust) -> None:
    trace = LoadTrace(load_WLE=np.random.default_rng(0).lognormal(0, 1, (3, 2, 64)))
    blind, knowing = (planner(trace, Topology.even(ranks=8, slots=10, ranks_per_node=per_node)) for per_node in (8, 4))
    for layer, load_E in enumerate(trace.load_LE):
        shares = [load_E / plan.placement_L[layer].copies_E for plan in (blind, knowing)]
        loads = [plan.placement_L[layer].held_RE @ share_E for plan, share_E in zip((blind, knowing), shares)]
        np.testing.assert_allclose(*map(np.sort, loads))
        tables = [np.asarray(plan.placement_L[layer].expert_RS)[None] for plan in (blind, knowing)]
        before, after = (
            at_home(table, load_E[None], Topology.even(ranks=8, slots=10, ranks_per_node=4)) for table in tables
        )
        assert after > 1.02 * before
