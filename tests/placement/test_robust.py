from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import LoadTrace, Packed, Topology, merge
from placement.metrics import peak_over_mean, rank_load_WLR
from placement.risk import risk
from placement.robust import Robust
from placement.scenarios import scenarios
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import drawn_loads, loads, topologies


@given(st.data(), st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=40, deadline=None)
def test_robust_keeps_the_planner_contract(data: st.DataObject, tail: float) -> None:
    trace = data.draw(loads(windows=3))
    topology = data.draw(topologies(trace.num_experts))
    plan = assert_keeps_the_planner_contract(Robust(tail=tail), trace, topology)
    assert float(plan.provenance["scenario_bound"]) <= float(plan.provenance["scenario_peak_over_mean"]) + 1e-9


def tasks(seed: int, names: int = 3, batches: int = 6) -> LoadTrace:
    """Tasks with experts of their own; batches wander a little around their task."""
    random = np.random.default_rng(seed)
    traces = []
    for name in range(names):
        mean_LE = random.lognormal(0.0, 1.0, (4, 32))
        load_WLE = random.poisson(200 * mean_LE, (batches, 4, 32)).astype(np.float64)
        traces.append(LoadTrace(load_WLE=load_WLE, name_W=[f"task {name}"] * batches))
    return merge(traces)


@pytest.mark.parametrize("named", [True, False])
def test_held_out_batches_of_single_tasks_are_better_balanced_than_by_the_sum(named: bool) -> None:
    fit, held = tasks(0).split()
    if not named:
        fit = replace(fit, name_W=())
    topology = Topology.even(ranks=8, slots=4, ranks_per_node=8)

    def excess(planner: Robust | Packed) -> float:
        plan = planner(fit, topology)
        return float(peak_over_mean(rank_load_WLR(plan, held.load_WLE), topology.speed_R).mean()) - 1

    assert excess(Robust()) <= 0.7 * excess(Packed())


def test_copies_go_to_whoever_is_hot_in_some_scenario_not_to_whoever_is_warm_in_all() -> None:
    load_WLE = np.ones((3, 1, 8))
    load_WLE[0, 0, 0] = 20  # hot in one scenario of three
    load_WLE[:, 0, 1] = 7.5  # warm in every one
    plan = Robust(tail=0.0)(LoadTrace(load_WLE=load_WLE), Topology.even(ranks=3, slots=3, ranks_per_node=3))
    assert plan.placement_L[0].copies_E.argmax() == 0


@pytest.mark.fast
@given(st.lists(st.floats(0, 9), min_size=1, max_size=6), st.floats(0, 1))
def test_risk_lies_between_the_mean_and_the_worst(values: list[float], tail: float) -> None:
    cost = float(risk(np.array(values), tail))
    assert np.mean(values) - 1e-9 <= cost <= max(values) + 1e-9
    assert float(risk(np.array(values), 0.0)) == max(values)


@pytest.mark.fast
def test_half_of_three_scenarios_counts_the_worst_whole_and_the_next_by_half() -> None:
    assert float(risk(np.array([1.0, 7.0, 4.0]), 0.5)) == pytest.approx((7 + 0.5 * 4) / 1.5)


@pytest.mark.fast
def test_windows_of_one_name_are_one_scenario_and_a_long_one_weighs_no_more() -> None:
    trace = LoadTrace(load_WLE=[[[1, 1]], [[300, 100]], [[1, 3]]], name_W=["a", "b", "a"])
    np.testing.assert_allclose(scenarios(trace, 8, 0)[:, 0], [[2 / 6, 4 / 6], [0.75, 0.25]])


@pytest.mark.fast
def test_clustering_finds_the_tasks_behind_nameless_windows() -> None:
    trace = tasks(1)
    found = scenarios(replace(trace, name_W=()), 3, 0)
    expected = scenarios(trace, 3, 0)
    distance = np.abs(found[:, None] - expected[None]).sum(axis=(2, 3))
    np.testing.assert_allclose(np.sort(distance.min(axis=0)), 0, atol=1e-9)


@pytest.mark.fast
def test_a_layer_idle_in_one_scenario_takes_the_mean_of_the_others() -> None:
    trace = LoadTrace(load_WLE=[[[1, 3], [1, 1]], [[2, 2], [0, 0]]])
    np.testing.assert_allclose(scenarios(trace, 8, 0)[1, 1], [0.5, 0.5])


def test_one_scenario_is_balanced_as_by_packing() -> None:
    trace, topology = drawn_loads(5, layers=3), Topology.even(ranks=8, slots=5, ranks_per_node=8)
    plan = Robust()(trace, topology)
    assert np.mean([certificate.peak_over_mean for certificate in plan.certificate_L]) <= 1.02
