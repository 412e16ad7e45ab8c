"""Placement, Plan, Topology and certificates: their laws, their files, and the errors for what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Certificate, Link, Packed, Placement, Plan, RoundRobin, Topology, verify
from placement.metrics import moves_L, peak_over_mean, rank_load_WLR, token_rank
from tests.placement.strategies import drawn_loads, loads, topologies

pytestmark = pytest.mark.fast
EVEN = Topology.even(ranks=4, slots=9, ranks_per_node=2)


@given(st.data())
def test_a_plan_survives_its_file_to_the_byte(data: st.DataObject) -> None:
    trace = data.draw(loads())
    plan = RoundRobin()(trace, data.draw(topologies(trace.num_experts)))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_a_fingerprint_covers_the_placements_alone() -> None:
    one, two = (Packed(seed=seed)(drawn_loads(0, layers=1), EVEN) for seed in (0, 1))
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != RoundRobin()(drawn_loads(0, layers=1), EVEN).fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("schema"), "field 'schema' is missing"),
        (lambda d: d.update(schema="evenmoe.plan/9"), "this version reads 'evenmoe.plan/1'"),
        (lambda d: d.pop("layers"), "field 'layers' is missing"),
        (lambda d: d["layers"][0].pop("expert_RS"), r"field 'layers\[0\].expert_RS' is missing"),
        (
            lambda d: d["layers"][0].update(expert_RS=[[0, 0]]),
            "rank 0 holds expert 0 twice",
        ),
        (lambda d: d["layers"][0]["certificate"].update(gap="wide"), r"field 'layers\[0\].certificate' is damaged"),
        (lambda d: d["layers"][0]["certificate"].pop("bound"), r"field 'layers\[0\].certificate' is damaged"),
        (lambda d: d["topology"].update(slots_R=[1]), "field 'topology' is damaged|the topology has 1 ranks"),
        (lambda d: d["topology"].pop("within_node"), "field 'topology' is damaged"),
        (lambda d: d.update(layer_L=[3, 3]), "ascending"),
        (lambda d: d["layers"][0]["expert_RS"].reverse(), "field 'fingerprint' is .* the file was changed"),
    ],
)
def test_a_damaged_plan_names_file_and_field(tmp_path: Path, change: Any, message: str) -> None:
    document = json.loads(Packed()(drawn_loads(0, layers=2), EVEN).to_json())
    change(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        Plan.load(tmp_path / "plan.json")
    assert str(caught.value).startswith(str(tmp_path / "plan.json"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = RoundRobin()(drawn_loads(0, layers=1), EVEN)
    plan.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        Packed()(drawn_loads(0, layers=1), EVEN).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "table, message",
    [
        ([[0, 1], [1, 1]], "rank 1 holds expert 1 twice"),
        ([[0, 2]], "expert 1 has no slot"),
        ([[0, -2]], "expert_RS holds -2"),
        ([[0.5]], "whole numbers"),
        ([0, 1], r"table \[ranks, slots\]"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(expert_RS=table)


def test_a_plan_must_fit_its_topology() -> None:
    placement = Placement(expert_RS=np.array([[0, 1], [2, -1]]))
    with pytest.raises(ValueError, match="layer 0 puts 2 experts on rank 0 of 1 slots"):
        Plan(placement_L=(placement,), topology=Topology(slots_R=(1, 2), ranks_per_node=2))
    with pytest.raises(ValueError, match="the topology has 3 ranks, the placements have 2"):
        Plan(placement_L=(placement,), topology=Topology(slots_R=(2, 2, 2), ranks_per_node=2))


def test_topologies_deal_slots_and_respect_memory() -> None:
    assert Topology.fitting(num_experts=8, ranks=4, ranks_per_node=2, spare=2).slots_R == (3, 3, 2, 2)
    cut = Topology(slots_R=(4, 4), ranks_per_node=2, memory_R=(100, 35), expert_bytes=10)
    assert cut.slots_R == (4, 3)
    assert replace(cut, slots_R=(9, 9)).slots_R == (9, 3)
    assert Topology.read(cut.fields()) == cut
    with pytest.raises(ValueError, match="speed_R needs one number > 0 for each of 2 ranks"):
        Topology(slots_R=(1, 1), ranks_per_node=1, speed_R=(1.0, 0.0))
    with pytest.raises(ValueError, match="memory_R needs one number >= 0"):
        Topology(slots_R=(1, 1), ranks_per_node=1, memory_R=(5,), expert_bytes=1)
    halves: list[dict[str, Any]] = [{"memory_R": (5, 5)}, {"expert_bytes": 5}, {"memory_R": (5, 5), "expert_bytes": -1}]
    for half in halves:
        with pytest.raises(ValueError, match="memory_R and expert_bytes, at least 1, need each other"):
            Topology(slots_R=(1, 1), ranks_per_node=1, **half)
    with pytest.raises(ValueError, match="latency >= 0 s and bandwidth > 0"):
        Link(latency=float("nan"), bandwidth=1.0)


def test_peaks_weigh_speed_and_an_idle_layer_is_even() -> None:
    np.testing.assert_allclose(peak_over_mean(np.array([[2.0, 4.0], [3.0, 1.0], [0, 0]]), (1.0, 2.0)), [1, 2.25, 1])


@given(st.data())
@settings(max_examples=15)
def test_copies_share_a_load_and_lose_none_of_it(data: st.DataObject) -> None:
    trace = data.draw(loads(windows=2))
    plan = Packed()(trace, data.draw(topologies(trace.num_experts)))
    rank_load = rank_load_WLR(plan, trace.load_WLE)
    np.testing.assert_allclose(rank_load.sum(axis=2), trace.load_WLE.sum(axis=2))


def test_optimal_is_said_only_of_a_value_that_meets_its_bound() -> None:
    assert Certificate(bound=1.2, gap=0.0, method="closed form").status == "optimal"
    assert Certificate(bound=1.2, gap=0.031, method="HiGHS says optimal").status == "feasible, gap 3.1 %"


def test_verify_needs_a_topology_and_certificates_and_a_trace_of_the_model() -> None:
    trace = drawn_loads(0, layers=2)
    bare = Plan(placement_L=RoundRobin()(trace, EVEN).placement_L)
    with pytest.raises(ValueError, match="does not name its topology"):
        verify(bare, trace)
    with pytest.raises(ValueError, match="has no certificates"):
        verify(Plan(placement_L=bare.placement_L, topology=EVEN), trace)
    with pytest.raises(ValueError, match="use a plan and a trace of one model"):
        verify(RoundRobin()(trace, EVEN), drawn_loads(0, layers=3))


def test_verify_on_another_trace_says_that_the_claims_do_not_hold_there() -> None:
    plan = Packed()(drawn_loads(0, layers=2), EVEN)
    assert all(verdict.faults for verdict in verify(plan, drawn_loads(1, layers=2)))


def test_moves_count_what_ranks_must_fetch() -> None:
    before, after = (
        Plan(placement_L=(Placement(expert_RS=np.array(table)),)) for table in ([[0, 1], [2, 0]], [[0, 2], [2, 1]])
    )
    assert moves_L(before, after).tolist() == [2]
    with pytest.raises(ValueError, match="cannot compare"):
        moves_L(before, RoundRobin()(drawn_loads(0, layers=1), EVEN))


def test_tokens_take_the_copies_of_an_expert_in_turn() -> None:
    placement = Placement(expert_RS=np.array([[0, 1], [0, 2], [0, 3]]))
    tokens, ranks = token_rank(placement, np.array([[0, 3]] * 6, dtype=np.int32))
    assert ranks[0::2].tolist() == [0, 1, 2, 0, 1, 2]
    assert ranks[1::2].tolist() == [2] * 6
    assert tokens.tolist() == [t for t in range(6) for _ in range(2)]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"schema": "evenmoe.plan/1", "provenance": {}, "layers": [{"expert_RS": [[0, 1000000000000]]}]}',
            "expert 1 has no slot",
        ),
        ("[" * 100_000, "not a plan"),
        (f'{{"schema": {"9" * 5000}}}', "not a plan"),
    ],
    ids=["an expert beyond all slots", "too deep", "a number too long"],
)
def test_a_file_that_asks_for_the_impossible_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^some.json: .*{message}"):
        Plan.from_json(text, source="some.json")
