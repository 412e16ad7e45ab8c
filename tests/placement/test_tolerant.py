"""Plans that survive the loss of a failure domain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Packed, Plan, Tolerant, Topology, verify
from placement.metrics import peak_over_mean_L
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import drawn_loads
from tests.placement.test_cli import facts, run


@given(st.integers(0, 99), st.integers(1, 12), st.integers(2, 6), st.integers(1, 4), st.integers(0, 5), st.data())
@settings(max_examples=25, deadline=None)
def test_no_expert_is_lost_with_any_domain(
    seed: int, num_experts: int, ranks: int, node: int, spare: int, data: st.DataObject
) -> None:
    slots = -(-2 * num_experts // ranks)
    slots_R = [slots + data.draw(st.integers(0, 1)) + spare for _ in range(ranks)]
    topology = Topology(slots_R=tuple(slots_R), ranks_per_node=node, speed_R=(1.0, 0.5, 2.0, 1.0, 1.0, 1.0)[:ranks])
    domain_R = np.array(topology.node_R if topology.nodes > 1 else range(ranks))
    room = sum(min(num_experts, int(np.array(slots_R)[domain_R == d].sum())) for d in range(domain_R.max() + 1))
    trace = drawn_loads(seed, layers=2, experts=num_experts)
    if room < 2 * num_experts:
        with pytest.raises(ValueError, match="in 2 failure domains each need"):
            Tolerant()(trace, topology)
        return
    plan = assert_keeps_the_planner_contract(Tolerant(packed=Packed(searched=0)), trace, topology)
    for placement in plan.placement_L:
        for lost in range(domain_R.max() + 1):
            assert placement.held_RE[domain_R != lost].any(axis=0).all()


def test_tolerance_costs_a_little_balance_and_none_where_balance_asks_for_as_many_copies() -> None:
    trace = drawn_loads(0, layers=4, experts=32)
    topology = Topology.even(ranks=8, slots=12, ranks_per_node=2)
    flat, safe = (
        peak_over_mean_L(planner(trace, topology), trace.load_LE, topology) for planner in (Packed(), Tolerant())
    )
    assert (safe >= flat - 1e-9).all()
    assert safe.max() < 1.1
    none = Tolerant(failures=0)(trace, topology)
    np.testing.assert_allclose(peak_over_mean_L(none, trace.load_LE, topology), flat)


def test_three_domains_survive_two_losses() -> None:
    plan = Tolerant(failures=2)(drawn_loads(0, experts=8), Topology.even(ranks=6, slots=4, ranks_per_node=2))
    assert all((placement.copies_E >= 3).all() for placement in plan.placement_L)
    with pytest.raises(
        ValueError, match="8 experts in 4 failure domains each need 32 slots; 3 domains have room for 24"
    ):
        Tolerant(failures=3)(drawn_loads(0, experts=8), Topology.even(ranks=6, slots=8, ranks_per_node=2))
    with pytest.raises(ValueError, match="failures=-1"):
        Tolerant(failures=-1)


def test_verify_finds_a_claim_of_tolerance_that_does_not_hold() -> None:
    trace, topology = drawn_loads(0, layers=2, experts=8), Topology.even(ranks=4, slots=4, ranks_per_node=2)
    plan = Packed()(trace, topology)
    boast = replace(plan, provenance={**plan.provenance, "tolerates": 3})
    assert any("claims to survive 3 lost failure domains" in fault for v in verify(boast, trace) for fault in v.faults)


def test_the_command_line_asks_for_it(tmp_path: Path) -> None:
    drawn_loads(0, windows=4, layers=2, experts=8).save(tmp_path / "t.npz")
    machine = ("--nodes", 2, "--ranks-per-node", 2, "--slots", 4, "--tolerate", 1)
    said = facts("plan", tmp_path / "t.npz", *machine, "-o", tmp_path / "p")
    assert said["planner"] == "packed, tolerant"
    for placement in Plan.load(tmp_path / "p").placement_L:
        assert (placement.held_RE[:2].any(axis=0) & placement.held_RE[2:].any(axis=0)).all()
    assert facts("verify", tmp_path / "p", "--trace", tmp_path / "t.npz")["holds"]
    few = ("--nodes", 2, "--ranks-per-node", 2, "--slots", 3, "--tolerate", 1)
    assert "room for 12" in run("plan", tmp_path / "t.npz", *few, "-o", tmp_path / "q", code=2)
    wrong = run("plan", tmp_path / "t.npz", *machine, "--planner", "robust", "-o", tmp_path / "q", code=2)
    assert "--tolerate is for packed" in wrong
    both = run("plan", tmp_path / "t.npz", *machine, "--groups", 4, "-o", tmp_path / "q", code=2)
    assert "--groups keeps an expert on one node" in both
