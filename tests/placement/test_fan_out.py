"""Fan-out as a second objective: a token's experts on few ranks, and on few nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Affinity, Plan, Topology
from placement.metrics import fan_out, peak_over_mean_L
from placement.packing import placements, table_of
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import choices, coactive

TWO_NODES = Topology.even(ranks=8, slots=2, ranks_per_node=4)


@given(st.integers(0, 999), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=20, deadline=None)
def test_with_two_choices_a_token_fan_out_is_worth_the_ranks_and_nodes_it_spares(seed: int, node_worth: float) -> None:
    trace = choices(seed, tokens=40, layers=2, experts=16, top_k=2)
    problem = Affinity(fan_out=1.0, node_worth=node_worth).problem(trace, TWO_NODES)
    problem = replace(problem, chain=replace(problem.chain, pair_LEE=np.zeros_like(problem.chain.pair_LEE)))
    random = np.random.default_rng(seed)
    rank_LE = np.stack([random.permutation(np.repeat(np.arange(8), 2)) for _ in range(2)])
    plan = Plan(placement_L=placements(table_of(rank_LE, TWO_NODES)))
    assert trace.expert_TLK is not None
    ranks, nodes = (fan_out(plan, trace.expert_TLK, group_R) for group_R in (range(8), TWO_NODES.node_R))
    spared = (1 - node_worth) * (2 - ranks) + node_worth * (2 - nodes)
    # A layer's tokens all on one rank each are worth the mass of a layer's hops: 40 tokens.
    assert problem.worth_B(rank_LE[None])[0] == pytest.approx(2 * 40 * spared)


@given(st.integers(0, 999), st.sampled_from([0.0, 0.5, 0.9]))
@settings(max_examples=20, deadline=None)
def test_the_score_of_a_swap_is_the_change_of_worth(seed: int, node_worth: float) -> None:
    trace = choices(seed, tokens=40, layers=3, experts=16, top_k=3)
    problem = Affinity(fan_out=2.0, node_worth=node_worth).problem(trace, TWO_NODES)
    random = np.random.default_rng(seed)
    rank_LE = np.stack([random.permutation(np.repeat(np.arange(8), 2)) for _ in range(3)])
    layer = np.array([1])
    gain = problem.chain.gain(rank_LE[None], layer)[0]
    score_EE = problem._scores(rank_LE[layer], gain, layer, np.zeros((1, 1, 8)), np.arange(16)[None])[0]
    for one, other in random.integers(16, size=(12, 2)).tolist():
        swapped = rank_LE.copy()
        swapped[1, [one, other]] = swapped[1, [other, one]]
        before, after = problem.worth_B(np.stack([rank_LE, swapped]))
        if rank_LE[1, one] == rank_LE[1, other] or after <= before + 1e-6:
            assert score_EE[one, other] < 1e-5
        else:
            assert score_EE[one, other] == pytest.approx(after - before)


@given(st.integers(0, 999), st.sampled_from([1.0, 20.0]))
@settings(max_examples=6, deadline=None)
def test_a_tokens_experts_share_nodes_as_well_as_ranks_within_the_cap(seed: int, weight: float) -> None:
    trace = coactive(seed, tokens=500, layers=3, experts=16, top_k=4, bands=2)
    assert trace.expert_TLK is not None
    reached: dict[str, tuple[float, float]] = {}
    for name, planner in {
        "hops alone": Affinity(balance_cap=1.2),
        "ranks alone": Affinity(balance_cap=1.2, fan_out=weight, node_worth=0.0),
        "ranks and nodes": Affinity(balance_cap=1.2, fan_out=weight),
    }.items():
        plan = assert_keeps_the_planner_contract(planner, trace, TWO_NODES)
        assert plan.provenance["cap"] == "kept"
        assert peak_over_mean_L(plan, trace.load_LE, TWO_NODES).max() <= 1.2 + 1e-9
        reached[name] = tuple(fan_out(plan, trace.expert_TLK, group_R) for group_R in (range(8), TWO_NODES.node_R))
    ranks, nodes = (dict(zip(reached, column, strict=True)) for column in zip(*reached.values(), strict=True))
    assert ranks["ranks and nodes"] < ranks["hops alone"]
    assert nodes["ranks and nodes"] < min(nodes["hops alone"], nodes["ranks alone"])
