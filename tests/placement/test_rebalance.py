from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import LoadTrace, Packed, Placement, Plan, Planner, RoundRobin, Topology
from placement.metrics import moves_L, peak_over_mean_L
from placement.rebalance import Rebalance, relabelled
from placement.robust import Robust
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import drawn_loads, loads, topologies


@given(st.data(), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_the_move_budget_is_never_exceeded_and_the_peak_never_rises(data: st.DataObject, budget: int) -> None:
    before = data.draw(loads())
    topology = data.draw(topologies(before.num_experts))
    after = LoadTrace(load_WLE=before.load_WLE[:, :, ::-1] + 1)
    start = data.draw(st.sampled_from([Packed(), RoundRobin()]))(before, topology)
    plan = assert_keeps_the_planner_contract(Rebalance(start=start, most_moves=budget), after, topology)
    assert (moves_L(start, plan) <= budget).all()
    old, new = (peak_over_mean_L(p, after.load_LE, topology) for p in (start, plan))
    assert (new <= old * (1 + 1e-9)).all()


def drift(seed: int) -> tuple[LoadTrace, LoadTrace, Topology]:
    """A large model whose load has drifted so far that staying costs a quarter."""
    before = drawn_loads(seed, layers=6, experts=256, spread=1.0)
    random = np.random.default_rng(seed + 1)
    after = LoadTrace(load_WLE=before.load_WLE * random.lognormal(0.0, 0.25, before.load_WLE.shape))
    return before, after, Topology.fitting(num_experts=256, ranks=32, ranks_per_node=8, spare=32)


def test_32_fetches_a_layer_follow_a_drift_that_costs_a_quarter() -> None:
    before, after, topology = drift(0)
    start = Packed()(before, topology)
    assert peak_over_mean_L(start, after.load_LE, topology).mean() >= 1.2
    plan = Rebalance(start=start, most_moves=32)(after, topology)
    assert peak_over_mean_L(plan, after.load_LE, topology).mean() <= 1.02
    assert moves_L(start, plan).max() <= 32


def test_a_bad_start_is_improved_on_the_very_trace_that_it_was_made_from() -> None:
    before, _, topology = drift(0)
    start = RoundRobin()(before, topology)
    plan = Rebalance(start=start, most_moves=32)(before, topology)
    assert (moves_L(start, plan) > 0).all()
    old, new = (peak_over_mean_L(each, before.load_LE, topology).mean() for each in (start, plan))
    assert new < 0.8 * old


@pytest.mark.parametrize("planner", [Packed(), Robust(), Robust(tail=1.0)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_unchanged_load_moves_nothing(planner: Planner, scale: float) -> None:
    before = drawn_loads(1, windows=3, layers=4, experts=64)
    topology = Topology.fitting(num_experts=64, ranks=8, ranks_per_node=8, spare=8)
    start = planner(before, topology)
    plan = Rebalance(start=start, most_moves=64)(LoadTrace(load_WLE=before.load_WLE * scale), topology)
    assert moves_L(start, plan).sum() == 0
    assert plan.fingerprint == start.fingerprint


def test_ranks_that_only_changed_names_are_recognised() -> None:
    topology = Topology.even(ranks=4, slots=2, ranks_per_node=2)
    start = Placement(expert_RS=np.arange(8).reshape(4, 2))
    shuffled = Placement(expert_RS=start.expert_RS[[2, 0, 3, 1]])
    assert relabelled(start, shuffled, topology) == start


def test_only_alike_ranks_trade_names() -> None:
    topology = Topology(slots_R=(2, 2, 1, 1), ranks_per_node=4)
    start = Placement(expert_RS=np.array([[0, 1], [2, 3], [4, -1], [5, -1]]))
    target = Placement(expert_RS=np.array([[2, 3], [4, 5], [1, -1], [0, -1]]))
    named = relabelled(start, target, topology)
    assert [set(named.experts_of(rank).tolist()) for rank in range(4)][1] == {2, 3}
    Plan(placement_L=(named,), topology=topology)


def test_a_start_of_other_ranks_is_refused() -> None:
    before, after, topology = drift(2)
    start = Packed()(before, topology)
    with pytest.raises(ValueError, match="the plan has 32 ranks, the topology 64"):
        Rebalance(start=start, most_moves=1)(after, Topology.even(ranks=64, slots=5, ranks_per_node=8))


def test_a_topology_that_lost_slots_which_the_plan_fills_is_refused() -> None:
    before, after, topology = drift(3)
    start = Packed()(before, topology)
    smaller = Topology.even(ranks=32, slots=8, ranks_per_node=8)
    with pytest.raises(ValueError, match="layer 0 puts 9 experts on rank 0 of 8 slots"):
        Rebalance(start=start, most_moves=1)(after, smaller)
