"""Integer programmes: exact on small instances, honest after a time-out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Link, LoadTrace, Packed, Topology, programmes
from placement.affinity import Affinity
from placement.bounds import CLOSED_FORM
from placement.certify import verify
from placement.ilp import Ilp, IlpWhole
from placement.metrics import local_share, peak_over_mean_L
from placement.rank_names import named, slowest, slowness_RR
from placement.solver import Solved
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import choices, drawn_loads, loads, topologies


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_ilp_keeps_the_planner_contract(data: st.DataObject) -> None:
    trace = data.draw(loads(most_experts=6))
    topology = data.draw(topologies(trace.num_experts).filter(lambda t: t.ranks <= 4))
    assert_keeps_the_planner_contract(Ilp(seconds=60), trace, topology)


@given(st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_the_balance_programme_is_exact(seed: int) -> None:
    trace = drawn_loads(seed, layers=1, experts=6)
    topology = Topology(slots_R=(2, 3, 1), ranks_per_node=3, speed_R=(1.0, 2.0, 1.0))
    plan = Ilp(seconds=60)(trace, topology)
    load_E, speed_R = trace.load_LE[0], np.array([1.0, 2.0, 1.0])
    best = min(
        (np.bincount(rank_E, weights=load_E, minlength=3) / speed_R).max()
        for rank_E in itertools.product(range(3), repeat=6)
        if (np.bincount(rank_E, minlength=3) <= (2, 3, 1)).all()
    )
    assert plan.certificate_L[0].peak_over_mean == pytest.approx(best / (trace.load_LE.sum() / 4))
    assert plan.certificate_L[0].status == "optimal"
    solved, _ = programmes.balance(load_E, topology, 60, 0)
    assert solved.value == pytest.approx(best)


def test_counts_and_places_are_one_programme_where_there_are_spare_slots() -> None:
    load_E = np.array([9.0, 5, 2, 1])
    topology = Topology.even(ranks=3, slots=2, ranks_per_node=3)
    solved, held_RE = programmes.balance(load_E, topology, 60, 0)
    assert solved.proved
    assert (held_RE / held_RE.sum(axis=0) @ load_E).max() == pytest.approx(solved.value)
    packed = Packed()(LoadTrace(load_WLE=load_E[None, None]), topology)
    assert packed.certificate_L[0].peak_over_mean * load_E.sum() / 3 == pytest.approx(solved.value)


def test_a_time_out_is_feasible_with_its_gap_and_never_optimal() -> None:
    """Large prime-like loads with no room to spare: the optimum is not proved in two seconds."""
    trace = drawn_loads(0, layers=1, experts=128, spread=1.5)
    solved, _ = programmes.balance(trace.load_LE[0], Topology.even(ranks=16, slots=8, ranks_per_node=8), 2.0, 0)
    assert not solved.proved
    assert solved.status != "optimal"
    assert not solved.found or solved.status.startswith("feasible, gap ")
    plan = Ilp(seconds=2.0)(trace, Topology.even(ranks=16, slots=8, ranks_per_node=8))
    (certificate,) = plan.certificate_L
    assert certificate.status.startswith("feasible, gap ")
    assert certificate.gap > 0


def test_what_a_status_says_follows_from_the_bound() -> None:
    common = {"found": True, "infeasible": False, "value": 2.0, "solver": "HiGHS"}
    assert Solved(proved=False, bound=1.6, **common).status == "feasible, gap 25 %"  # type: ignore[arg-type]
    assert Solved(proved=True, bound=2.0, **common).status == "optimal"  # type: ignore[arg-type]
    assert Solved(proved=False, bound=0.0, **common).status == "feasible, gap inf %"  # type: ignore[arg-type]


def test_a_solvers_bound_is_verified_as_unproved_and_a_false_one_is_caught() -> None:
    trace = drawn_loads(3, layers=1, experts=6, spread=1.5)
    plan = Ilp(seconds=60)(trace, Topology.even(ranks=3, slots=2, ranks_per_node=3))
    (certificate,), (verdict,) = plan.certificate_L, verify(plan, trace)
    assert not verdict.faults
    assert verdict.unproved == (certificate.method != CLOSED_FORM)
    assert verdict.bound <= certificate.bound * (1 + 1e-9)
    value = certificate.peak_over_mean
    false = replace(certificate, bound=1.01 * value, gap=1 / 1.01 - 1, method="solver's dual bound")
    (caught,) = verify(replace(plan, certificate_L=(false,)), trace)
    assert caught.unproved
    assert any("claims that nothing is below" in fault for fault in caught.faults)


def test_blocks_under_a_cap_keep_it_and_keep_no_fewer_hops_than_their_start() -> None:
    trace = choices(0, tokens=1500, layers=4, experts=16, top_k=2)
    topology = Topology.even(ranks=4, slots=4, ranks_per_node=4)
    plan = assert_keeps_the_planner_contract(Ilp(seconds=120, balance_cap=1.05), trace, topology)
    assert peak_over_mean_L(plan, trace.load_LE, topology).max() <= 1.05 + 1e-6
    start = Affinity(balance_cap=1.05)(trace, topology)
    assert float(plan.provenance["local"]) >= float(start.provenance["local"]) - 1e-9


def test_the_whole_programme_agrees_with_the_exact_dynamic_programme() -> None:
    trace = choices(1, tokens=40, layers=3, experts=4, top_k=1)
    topology = Topology.even(ranks=2, slots=2, ranks_per_node=2)
    plan = IlpWhole(seconds=60)(trace, topology)
    assert plan.provenance["hops"] == "optimal"
    assert plan.provenance["local"] == pytest.approx(Affinity()(trace, topology).provenance["local"])
    assert float(plan.provenance["hops_bound"]) >= float(plan.provenance["local"]) - 1e-6


def test_the_whole_programme_says_feasible_when_time_is_up() -> None:
    trace = choices(2, tokens=400, layers=8, experts=8, top_k=1, follows=0.3)
    topology = Topology.even(ranks=4, slots=2, ranks_per_node=4)
    plan = IlpWhole(seconds=1.0)(trace, topology)
    assert str(plan.provenance["hops"]).startswith("feasible, gap ")
    assert trace.follow_LEE is not None
    assert float(plan.provenance["hops_bound"]) >= local_share(plan, trace.follow_LEE, range(4)) - 1e-6


def test_a_cap_that_nothing_keeps_is_said_to_be_one() -> None:
    trace = choices(1, tokens=40, layers=2, experts=4, top_k=1)
    with pytest.raises(ValueError, match=r"no placement keeps a balance cap of 1\.0"):
        IlpWhole(seconds=60, balance_cap=1.0)(trace, Topology.even(ranks=2, slots=2, ranks_per_node=2))


def test_without_highs_cbc_proves_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    topology, load_E = Topology.even(ranks=3, slots=2, ranks_per_node=3), np.array([9.0, 8, 5, 4, 2, 1])
    first, _ = programmes.balance(load_E, topology, 60, 0)
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    second, _ = programmes.balance(load_E, topology, 60, 0)
    assert (first.solver, second.solver) == ("HiGHS", "CBC")
    assert first.proved
    assert second.proved
    assert first.value == pytest.approx(second.value)


def test_a_time_out_of_cbc_is_feasible_or_not_found_and_never_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    load_E = drawn_loads(0, layers=1, experts=64, spread=1.5).load_LE[0]
    solved, _ = programmes.balance(load_E, Topology.even(ranks=8, slots=8, ranks_per_node=8), 1.0, 0)
    assert solved.solver == "CBC"
    assert not solved.proved
    assert solved.status != "optimal"


def brute_names(flow: np.ndarray, slow_RR: np.ndarray) -> float:
    every = list(itertools.permutations(range(len(slow_RR))))
    return min(slowest(flow, np.array(way), slow_RR) for way in itertools.product(every, repeat=len(flow) + 1))


@given(st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_naming_ranks_is_exact_where_all_namings_can_be_listed(seed: int) -> None:
    """MoETuner's second programme on a generated instance: two nodes whose link is nine times slower."""
    flow = np.random.default_rng(seed).integers(0, 30, (2, 3, 3)).astype(np.float64)
    topology = two_nodes(ranks=3)
    rank_LG, proved = named(flow, topology, 10.0, 0)
    assert proved == "optimal"
    assert slowest(flow, rank_LG, slowness_RR(topology)) == pytest.approx(brute_names(flow, slowness_RR(topology)))


@given(st.integers(0, 999))
@settings(max_examples=5, deadline=None)
def test_the_naming_programme_is_exact_for_a_layer_between_two_that_stay(seed: int) -> None:
    random = np.random.default_rng(seed)
    before_RG, after_GR = random.integers(0, 90, (2, 4, 4)).astype(np.float64)
    slow_RR, flow = slowness_RR(two_nodes(ranks=4)), np.stack([before_RG, after_GR])
    solved, rank_G = programmes.names(before_RG, after_GR, slow_RR, np.ones((4, 4), dtype=np.int64), 60.0, seed=0)
    stay = np.arange(4)
    best = min(
        slowest(flow, np.stack([stay, way, stay]), slow_RR) for way in map(np.array, itertools.permutations(stay))
    )
    assert solved.proved
    assert slowest(flow, np.stack([stay, rank_G, stay]), slow_RR) == pytest.approx(best)


def test_more_ranks_than_can_be_listed_are_named_by_blocks_and_never_worse_than_as_they_came() -> None:
    flow = np.random.default_rng(0).integers(0, 90, (2, 8, 8)).astype(np.float64)
    topology = two_nodes(ranks=8)
    rank_LG, proved = named(flow, topology, 60.0, 0)
    assert proved == "searched by blocks"
    assert (np.sort(rank_LG, axis=1) == np.arange(8)).all()
    unnamed = np.repeat(np.arange(8)[None], 3, axis=0)
    assert slowest(flow, rank_LG, slowness_RR(topology)) < slowest(flow, unnamed, slowness_RR(topology))


def two_nodes(ranks: int) -> Topology:
    slow, fast = Link(latency=0.0, bandwidth=1e9), Link(latency=0.0, bandwidth=9e9)
    return Topology(slots_R=(2,) * ranks, ranks_per_node=(ranks + 1) // 2, within_node=fast, across_nodes=slow)
