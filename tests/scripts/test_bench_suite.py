"""The benchmark suite: what its table may claim, and that a peer which fails is a reason and not an end."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import experts, llep, peers, suite, table
from scripts.bench.measured import HEADS, KINDS, Measured, shared
from scripts.bench.table import interleaved

TINY = experts.Workload(tokens=32, dim=16, hidden=32, experts=4, top_k=2)


def row(measured: Measured) -> dict[str, object]:
    return dict(zip(HEADS, measured.row("default"), strict=True))


def made(*, clock: str = "CPU", foreign: list[float] | None = None, refused: str = "") -> Measured:
    return Measured(
        workload="tiny",
        what="forward",
        clock=clock,
        seconds={
            "floor": [1.0, 2.0, 4.0],
            "ours": [2.0, 4.0, 8.0],
            "again": [2.1, 4.0, 8.8],
            "slow": [40.0],
            "near": [2.04, 4.0, 8.2],
        },
        foreign=[0.0, 0.0, 0.0] if foreign is None else foreign,
        refused=refused,
    )


@pytest.mark.fast
def test_ratios_are_of_the_same_round_and_differences_inside_the_noise_are_marked() -> None:
    told = row(made())
    assert told["× floor"] == "2.00"
    assert told["noise"] == "0.050"
    assert told["best peer"] == "near"
    assert told["vs best peer"] == "≈1.02"
    assert told["every peer"] == "slow 10.00, near ≈1.02"


@pytest.mark.fast
def test_a_wall_time_of_fewer_than_three_clean_rounds_is_refused_and_cpu_seconds_are_not() -> None:
    busy = [0.0, 0.5, 0.0]
    refused = row(made(clock="wall", foreign=busy))
    assert refused["vs best peer"] == refused["ours, ms"] == "-"
    assert "2 of 3 rounds clean" in str(refused["remark"])
    assert row(made(clock="wall"))["vs best peer"] == "≈1.02"
    assert row(made(foreign=busy))["vs best peer"] == "≈1.02"
    assert row(made(clock="wall", refused="4 ranks on 2 CPUs"))["remark"] == "4 ranks on 2 CPUs"


@pytest.mark.fast
def test_a_wall_time_counts_the_clean_rounds_alone() -> None:
    seconds = {name: [*taken, 100.0] for name, taken in made().seconds.items() if len(taken) == 3}
    told = Measured(workload="", what="", clock="wall", seconds=seconds, foreign=[0.0, 0.0, 0.0, 0.9]).row("default")
    assert told[HEADS.index("rounds")] == 3


@pytest.mark.fast
def test_as_many_rounds_are_made_as_fit_and_one_at_least() -> None:
    calls: list[str] = []

    def candidate(name: str) -> float:
        calls.append(name)
        return 1.0

    runs = {name: (lambda name=name: candidate(name)) for name in ("a", "b")}  # type: ignore[misc]
    assert interleaved(runs, 5, budget=0.0).seconds == {"a": [1.0], "b": [1.0]}
    assert calls[:2] == ["a", "b"]
    assert len(calls) == 4
    assert len(interleaved(runs, 5).foreign) == 5
    assert len(interleaved(runs, 5, budget=100.0, warm=40.0, agree=lambda left: left).foreign) == 2


@pytest.mark.fast
def test_what_one_leaves_over_the_others_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes 10 of 60 seconds, as it may; the second takes 30 where it had 20; the third has what is left."""
    now = [0.0]
    monkeypatch.setattr("scripts.bench.measured.time.monotonic", lambda: now[0])
    given = []
    for seconds, (_, share) in zip((10.0, 30.0, 0.0), shared(60.0, {"a": 1.0, "b": 2.0, "c": 3.0})):
        given.append(share)
        now[0] += seconds
    assert given == pytest.approx([10.0, 20.0, 20.0])


@pytest.mark.skipif(
    not all(map(find_spec, ("transformers", "megatron"))), reason="pip install 'evenmoe[dev]' installs the peers"
)
def test_a_part_measures_ours_beside_every_peer_that_is_installed(tmp_path: Path) -> None:
    """In a process of its own, as the suite does it. A peer is there only if it gave what ours gave."""
    out = tmp_path / "measured"
    command = [sys.executable, "-m", "scripts.bench.part", "experts", "decode-256", "--out", str(out)]
    subprocess.run([*command, "--seconds", "1", "--rounds", "1"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    told = [Measured(**json.loads(line)) for line in out.read_text().splitlines()]
    assert [one.what for one in told] == [
        f"{dtype}, {way}" for dtype in ("float32", "bfloat16") for way in ("forward", "forward + backward")
    ]
    for one in told:
        assert not one.absent
        assert one.seconds.keys() == {"floor", "ours", "again", *peers.MAKERS}


@pytest.mark.fast
def test_a_peer_that_fails_or_gives_something_else_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(case: peers.Case) -> peers.Peer:
        raise ImportError("no module named peer")

    def other(case: peers.Case) -> peers.Peer:
        return peers.Peer(lambda: case.x_TD * 2, torch.nn.Identity())

    def failing(case: peers.Case) -> peers.Peer:
        return peers.Peer(lambda: case.x_TD @ case.x_TD, torch.nn.Identity())

    makers = {"missing": missing, "other": other, "failing": failing}
    monkeypatch.setattr(peers, "MAKERS", makers)
    monkeypatch.setattr(experts, "MAKERS", makers)
    bench = experts.Bench(TINY, torch.float32, backward=False)
    found, absent = bench.peers()
    samples, failed = experts.measure(bench.candidates() | found, 1)
    assert samples.seconds.keys() == {"floor", "ours", "again"}
    absent |= failed
    assert "no module named peer" in absent["missing"]
    assert "differs from ours" in absent["other"]
    assert "RuntimeError" in absent["failing"]


@pytest.mark.fast
def test_a_users_copy_of_lleps_planner_is_found_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "even.py").write_text("def split(total, ranks):\n    return [total / ranks] * ranks\n")
    (folder / "plans.py").write_text(
        "from .even import split\n"
        "class Plan: ...\n"
        "def compute_llep_lpt_plan(global_expert_counts, ep_size, ep_rank, num_local_experts, max_tokens_factor=1.1,\n"
        "                          min_tokens_per_gemm=1024):\n"
        "    assert num_local_experts * ep_size == len(global_expert_counts)\n"
        "    plan = Plan()\n"
        "    plan.gpu_loads = split(int(global_expert_counts.sum()), ep_size)\n"
        "    return plan\n"
        "def other(global_expert_counts, ep_size, num_local_experts, max_tokens_factor, min_tokens_per_gemm):\n"
        "    return compute_llep_lpt_plan(global_expert_counts, ep_size, 0, num_local_experts)\n"
    )
    for spec in (f"{folder / 'plans.py'}", f"{folder / 'plans.py'}:other"):
        planned = llep.planner_at(spec, headroom=1.05, min_chunk=1024)
        assert llep.peak(planned(torch.arange(8), 4)) == 1.0
    for spec, said in ((f"{folder / 'plans.py'}:none", "expected a function none"), ("nowhere.py", "there is no file")):
        with pytest.raises(ValueError, match=said):
            llep.planner_at(spec, headroom=1.05, min_chunk=1024)


@pytest.mark.fast
def test_forward_alone_is_quick_and_a_tuned_allocator_is_measured_with_backward() -> None:
    quick = suite.jobs_of(suite.QUICK, suite.ALLOCATORS[:1], KINDS[:1])
    assert {job.kinds for job in quick} == {("forward",)}
    whole = suite.jobs_of(suite.usual(), suite.ALLOCATORS, KINDS)
    assert {job.kinds for job in whole if job.allocator == "tuned"} == {("forward + backward",)}
    assert {job.kinds for job in whole if job.allocator == "default"} == {KINDS}
    assert {job.part for job in whole if job.allocator == "tuned"} == {"experts"}


@pytest.mark.fast
def test_a_part_that_dies_is_said_and_what_it_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "_run", {"samples": [], "tables": []})
    monkeypatch.setattr(table, "_markdown", [])
    monkeypatch.setattr(suite, "done", lambda job, seconds, given: ([made()], "killed" if job.part == "router" else ""))
    file = tmp_path / "suite.json"
    suite.main(["--only", "bip-8k64", "tiny-8x2", "--json", str(file)])
    whole: dict[str, Any] = json.loads(file.read_text())
    assert [one["allocator"] for one in whole["measured"]] == ["default", "default", "tuned"]
    assert whole["versions"]["torch"] == torch.__version__
    ratios, left = whole["tables"]
    assert len(ratios["rows"]) == 3
    assert left["rows"] == [["router, allocator default", "-", "killed"]]
    assert "The named workloads" in capsys.readouterr().out
