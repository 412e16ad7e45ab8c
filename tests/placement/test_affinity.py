"""Hops: the exact optimum where it can be listed, bounds that hold, and caps that are kept."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placement import LoadTrace, Packed, RoundRobin, Topology
from placement.affinity import Affinity
from placement.bounds import peak_bound_L
from placement.chain import Chain, all_groupings
from placement.hops import local_bound_L
from placement.ilp import Ilp
from placement.metrics import local_L, local_share, peak_over_mean, peak_over_mean_L, rank_load_WLR
from placement.robust import Robust, scenario_peaks
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import choices, topologies


def best_share(trace: LoadTrace, ranks: int) -> float:
    """The largest share of local hops, over every assignment of every layer, by brute force."""
    assert trace.follow_LEE is not None
    size = trace.num_experts // ranks
    every = {tuple(rank_E) for rank_E in itertools.permutations(np.repeat(np.arange(ranks), size).tolist())}
    worth = dict.fromkeys(every, 0.0)
    for pair_EE in trace.follow_LEE:
        worth = {
            new: max(
                value + sum(pair_EE[e, f] for e, g in enumerate(old) for f, h in enumerate(new) if g == h)
                for old, value in worth.items()
            )
            for new in every
        }
    return max(worth.values()) / float(trace.follow_LEE.sum())


@pytest.mark.parametrize("experts, ranks", [(6, 2), (6, 3), (4, 4)])
def test_small_layers_are_solved_to_their_optimum(experts: int, ranks: int) -> None:
    trace = choices(3, tokens=60, layers=4, experts=experts, top_k=1)
    topology = Topology.even(ranks=ranks, slots=experts // ranks, ranks_per_node=ranks)
    plan = assert_keeps_the_planner_contract(Affinity(), trace, topology)
    assert plan.provenance["hops"] == "optimal"
    assert float(plan.provenance["local"]) == pytest.approx(best_share(trace, ranks))


def test_the_search_finds_the_exact_optimum_of_a_mixtral_like_chain() -> None:
    trace = choices(0, tokens=300, layers=12, experts=8, top_k=1, follows=0.4)
    topology = Topology.even(ranks=4, slots=2, ranks_per_node=4)
    problem = Affinity().problem(trace, topology)
    optimum = float(Affinity()(trace, topology).provenance["local"])
    found = Affinity()._searched(problem)
    assert problem.chain.worth_B(found[None])[0] / problem.chain.pair_LEE.sum() >= 0.995 * optimum


def test_one_expert_on_each_rank_is_solved_exactly() -> None:
    trace = choices(1, tokens=200, layers=6, experts=8, top_k=1)
    plan = Affinity()(trace, Topology.even(ranks=8, slots=1, ranks_per_node=8))
    assert plan.provenance["hops"] == "optimal"
    assert float(plan.provenance["local_bound"]) == pytest.approx(float(plan.provenance["local"]), rel=1e-2)


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_affinity_keeps_the_planner_contract_on_any_topology(data: st.DataObject) -> None:
    trace = choices(data.draw(st.integers(0, 99)), tokens=30, layers=3, experts=data.draw(st.integers(3, 7)), top_k=2)
    topology = data.draw(topologies(trace.num_experts))
    cap = data.draw(st.sampled_from([math.inf, 1.3]))
    assume(cap == math.inf or peak_bound_L(trace.load_LE, topology).max() <= cap)
    assert_keeps_the_planner_contract(Affinity(balance_cap=cap, restarts=3, rounds=1), trace, topology)


@given(st.integers(0, 999), st.integers(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_placement_keeps_more_hops_local_than_its_bound(seed: int, top_k: int, copies: bool) -> None:
    trace = choices(seed, tokens=40, layers=3, experts=12, top_k=top_k)
    topology = Topology.even(ranks=4, slots=3 + copies, ranks_per_node=2)
    assert trace.follow_LEE is not None
    bound_L = local_bound_L(trace.follow_LEE, topology)
    assert (bound_L <= 1).all()
    for planner in (Packed(), Affinity(restarts=2, rounds=0), RoundRobin()):
        assert (local_L(planner(trace, topology), trace.follow_LEE, range(4)) <= bound_L + 1e-9).all()


def test_the_bound_is_not_far_above_what_is_found() -> None:
    trace = choices(0, tokens=2000, layers=6, experts=32, top_k=2)
    plan = Affinity()(trace, Topology.even(ranks=8, slots=4, ranks_per_node=8))
    assert (
        float(plan.provenance["local"])
        <= float(plan.provenance["local_bound"])
        <= 1.2 * float(plan.provenance["local"])
    )


def test_a_balance_cap_is_kept_while_hops_stay_local() -> None:
    trace = choices(0, tokens=3000, layers=6, experts=32, top_k=4)
    topology = Topology.even(ranks=8, slots=4, ranks_per_node=4)
    free, capped = Affinity()(trace, topology), Affinity(balance_cap=1.05)(trace, topology)
    assert peak_over_mean_L(free, trace.load_LE, topology).max() > 1.2
    assert peak_over_mean_L(capped, trace.load_LE, topology).max() <= 1.05 + 1e-9
    contiguous = RoundRobin()(trace, topology)
    assert trace.follow_LEE is not None
    shares = [local_share(plan, trace.follow_LEE, range(8)) for plan in (contiguous, capped, free)]
    assert shares[0] * 1.5 < shares[1] < shares[2]


def test_the_cap_is_kept_in_every_scenario() -> None:
    trace = choices(2, tokens=2000, layers=4, experts=24, top_k=2).windowed(1000)
    topology = Topology.even(ranks=4, slots=6, ranks_per_node=4)
    plan = Affinity(balance_cap=1.08, most_scenarios=2)(trace, topology)
    assert peak_over_mean(rank_load_WLR(plan, trace.load_WLE), topology.speed_R).max() <= 1.08 + 1e-9


def test_spare_slots_keep_a_cap_that_single_copies_cannot() -> None:
    trace = choices(5, tokens=600, layers=3, experts=8, top_k=1, follows=0.3)
    topology = Topology.even(ranks=4, slots=4, ranks_per_node=4)
    plan = assert_keeps_the_planner_contract(Affinity(balance_cap=1.02, restarts=4, rounds=2), trace, topology)
    with pytest.raises(ValueError, match=r"no placement keeps a balance cap of 1\.02: the bound of layer \d is 1\."):
        Affinity(balance_cap=1.02)(trace, Topology.even(ranks=4, slots=2, ranks_per_node=4))
    assert plan.provenance["cap"] == "kept"
    assert peak_over_mean_L(plan, trace.load_LE, topology).max() <= 1.02 + 1e-9


@given(st.integers(0, 999), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_spare_slots_keep_a_cap_in_every_scenario_that_balancing_alone_would_keep(seed: int, windows: int) -> None:
    trace = choices(seed, tokens=90, layers=3, experts=8, top_k=1, follows=0.3).windowed(90 // windows)
    topology = Topology.even(ranks=4, slots=4, ranks_per_node=2)
    load_LKE = Robust(most_scenarios=windows).loads(trace, topology)
    alone = Robust(tail=0.0).pack(load_LKE, topology) if windows > 1 else Packed().pack(load_LKE[:, 0], topology)
    balance_cap = float(scenario_peaks(alone, load_LKE, topology).max()) * (1 + 1e-6)
    planner = Affinity(balance_cap=balance_cap, most_scenarios=windows, restarts=2, rounds=0)
    plan = assert_keeps_the_planner_contract(planner, trace, topology)
    assert plan.provenance["cap"] == "kept"
    peak_WL = peak_over_mean(rank_load_WLR(plan, trace.load_WLE), topology.speed_R)
    assert peak_WL.max() <= balance_cap * (1 + 2e-6)


def test_a_cap_that_was_not_reached_is_said_with_its_layers() -> None:
    trace = choices(0, tokens=600, layers=3, experts=16, top_k=1, follows=0.3)
    topology = Topology.even(ranks=4, slots=4, ranks_per_node=4)
    cap = float(peak_bound_L(trace.load_LE, topology).max())
    plan = Affinity(balance_cap=cap, restarts=2, rounds=0)(trace, topology)
    over = [n for n, peak in enumerate(peak_over_mean_L(plan, trace.load_LE, topology)) if peak > cap * (1 + 1e-5)]
    assert over
    assert plan.provenance["cap"] == f"not kept in layers {', '.join(map(str, over))}: none found"
    solved = Ilp(balance_cap=cap, seconds=0.01)(trace, topology)
    within = peak_over_mean_L(solved, trace.load_LE, topology).max() <= cap * (1 + 1e-5)
    assert (solved.provenance["cap"] == "kept") == within


def test_hops_that_leave_the_rank_stay_within_the_node_where_that_is_worth_something() -> None:
    trace = choices(8, tokens=1000, layers=5, experts=16, top_k=2)
    topology = Topology.even(ranks=8, slots=2, ranks_per_node=4)
    assert trace.follow_LEE is not None
    within = [
        local_share(Affinity(node_worth=worth)(trace, topology), trace.follow_LEE, topology.node_R)
        for worth in (0.0, 0.9)
    ]
    assert within[1] > within[0]


@pytest.mark.fast
def test_every_grouping_is_listed_once() -> None:
    every = all_groupings(6, 3, 100)
    assert every is not None
    assert len({tuple(rank_E) for rank_E in every.tolist()}) == len(every) == 15
    assert all_groupings(64, 8, 400) is None
    assert all_groupings(5, 2, 400) is None


@pytest.mark.fast
@given(st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_a_sweep_never_loses_mass_and_fills_no_rank_beyond_its_room(seed: int) -> None:
    random = np.random.default_rng(seed)
    chain = Chain(pair_LEE=random.random((3, 6, 6)), near_RR=np.eye(3), room_R=(3, 2, 2))
    start = chain.started(3, random)
    swept = chain.swept(start)
    assert (chain.worth_B(swept) >= chain.worth_B(start) - 1e-9).all()
    for rank_LE in swept:
        assert all((np.bincount(rank_E, minlength=3) <= (3, 2, 2)).all() for rank_E in rank_LE)


@given(st.integers(0, 999), st.sampled_from([1.05, 1.3, math.inf]), st.sampled_from([0.0, 0.0, 1.0]), st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_swaps_stop_only_where_none_is_left_that_helps(seed: int, cap: float, fan_out: float, scenarios: int) -> None:
    """Scores are made anew for what a swap has touched alone: at the end they must be as they are from scratch."""
    trace = choices(seed, tokens=30, layers=3, experts=12, top_k=2).windowed(15)
    topology = Topology(slots_R=(4, 3, 3, 2), ranks_per_node=2, speed_R=(1.0, 1.0, 2.0, 0.5))
    problem = Affinity(balance_cap=cap, fan_out=fan_out, most_scenarios=scenarios).problem(trace, topology)
    random = np.random.default_rng(seed)
    start_AE = np.stack([random.permutation(np.repeat(np.arange(4), topology.slots_R)) for _ in range(5)])
    layer_A, gain_AER = random.integers(3, size=5), random.random((5, 12, 4))
    end_AE = problem._swapped(start_AE, gain_AER, layer_A, most_swaps=10_000)
    every = np.repeat(np.arange(12)[None], 5, axis=0)
    assert (problem._scores(end_AE, gain_AER, layer_A, problem._times(end_AE, layer_A), every) == -np.inf).all()
    assert (np.sort(end_AE, axis=1) == np.sort(start_AE, axis=1)).all()


@pytest.mark.fast
def test_loads_alone_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match="affinity needs each token's choices, or pairs of layers"):
        Affinity()(LoadTrace(load_WLE=np.ones((1, 2, 4))), Topology.even(ranks=2, slots=2, ranks_per_node=2))
    with pytest.raises(ValueError, match="must be at least 1"):
        Affinity(balance_cap=0.9)
