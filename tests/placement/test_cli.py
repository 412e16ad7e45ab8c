"""moe-place, as a user runs it: plans, checks, and one line for what cannot be."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from placement import LoadTrace, Plan, console, merge
from placement.cli import app
from tests.placement.strategies import choices, drawn_loads

MACHINE = ("--nodes", "2", "--ranks-per-node", "2", "--slots", "9")


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr or result.stdout


def facts(*words: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(*words, "--json"))
    return document


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    choices(0, tokens=400, layers=3, experts=32, top_k=2).windowed(100).save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


@pytest.mark.parametrize("planner", ["auto", "round-robin", "packed", "robust", "affinity", "ilp"])
def test_every_planner_plans_and_its_certificates_verify(tmp_path: Path, trace: Path, planner: str) -> None:
    out = tmp_path / "plan.json"
    said = facts("plan", trace, *MACHINE, "--planner", planner, "--time-limit", 2, "-o", out)
    assert {"planner", "layers", "peak_over_mean", "seconds", "duplicates", "moves"} <= set(said)
    assert said["duplicates"] == said["moves"] == 0
    for layer in said["layers"]:
        assert {"layer", "peak_over_mean", "bound", "gap", "status"} <= set(layer)
        assert layer["status"] == "optimal" or re.fullmatch(r"feasible, gap [\d.e+-]+ %", layer["status"])
    checked = facts("verify", out, "--trace", trace)
    assert checked["holds"]
    assert checked["same_trace"]
    sidecar = json.loads((tmp_path / "plan.json.sidecar.json").read_text())
    assert sidecar["provenance"]["trace"] == LoadTrace.load(trace).fingerprint


def test_a_plan_is_the_same_to_the_byte_for_the_same_seed(tmp_path: Path, trace: Path) -> None:
    for name in ("a", "b"):
        run("plan", trace, *MACHINE, "--planner", "affinity", "--balance-cap", 1.1, "--seed", 3, "-o", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_slots_are_each_ranks_or_all_ranks_together_or_a_list(tmp_path: Path, trace: Path) -> None:
    shapes = []
    for slots in ("9", "36", "9,9,9,9"):
        run("plan", trace, *MACHINE[:4], "--slots", slots, "--planner", "packed", "-o", tmp_path / "p")
        shapes.append(Plan.load(tmp_path / "p").topology)
    assert shapes[0] == shapes[1] == shapes[2]
    run("plan", trace, *MACHINE[:4], "--slots", "34", "--planner", "packed", "-o", tmp_path / "p")
    topology = Plan.load(tmp_path / "p").topology
    assert topology is not None
    assert topology.slots_R == (9, 9, 8, 8)


def test_score_knows_what_the_trace_can_tell_and_says_null_for_the_rest(tmp_path: Path, trace: Path) -> None:
    run("plan", trace, *MACHINE, "-o", tmp_path / "p")
    known = facts("score", trace, tmp_path / "p")
    assert 0 < known["local_hops"] <= known["local_hops_node"] <= 1
    assert 1 <= known["fan_out_nodes"] <= known["fan_out_ranks"] <= 2
    assert 1 <= known["peak_over_mean"] <= known["worst_layer"]
    drawn_loads(0, layers=3).save(tmp_path / "loads.npz")
    unknown = facts("score", tmp_path / "loads.npz", tmp_path / "p")
    assert unknown["local_hops"] is unknown["fan_out_ranks"] is unknown["fan_out_nodes"] is None


def test_rebalancing_keeps_its_budget_and_diff_counts_the_same_moves(tmp_path: Path, trace: Path) -> None:
    drawn_loads(1, layers=3).save(tmp_path / "later.npz")
    run("plan", trace, *MACHINE, "--planner", "packed", "-o", tmp_path / "old")
    said = facts(
        "plan", tmp_path / "later.npz", *MACHINE, "--from", tmp_path / "old", "--max-moves", 4, "-o", tmp_path / "new"
    )
    assert max(layer["moves"] for layer in said["layers"]) <= 4
    assert facts("diff", tmp_path / "old", tmp_path / "new")["moves"] == said["moves"] > 0
    again = facts("plan", trace, *MACHINE, "--from", tmp_path / "old", "--max-moves", 4, "-o", tmp_path / "same")
    assert again["moves"] == 0


def test_a_plan_that_was_tampered_with_fails_verification_with_exit_1(tmp_path: Path, trace: Path) -> None:
    run("plan", trace, *MACHINE, "--planner", "affinity", "-o", tmp_path / "p")
    document = json.loads((tmp_path / "p").read_text())
    document["layers"][0]["certificate"]["bound"] = 1.9
    document["layers"][1]["certificate"]["local_bound"] = 0.001
    (tmp_path / "p").write_text(json.dumps(document))
    said = run("verify", tmp_path / "p", "--trace", trace, code=1)
    assert "layer 0: claims" in said
    assert "layer 1: claims that at most 0.001000 can stay local" in said


def test_each_claim_about_hops_is_checked_on_its_own(tmp_path: Path, trace: Path) -> None:
    run("plan", trace, *MACHINE, "--planner", "affinity", "-o", tmp_path / "p")
    document = json.loads((tmp_path / "p").read_text())
    document["layers"][0]["certificate"]["local"] = 0.99
    del document["layers"][0]["certificate"]["local_bound"]
    document["provenance"] |= {"local": 0.98, "local_bound": 0.001}
    (tmp_path / "p").write_text(json.dumps(document))
    said = run("verify", tmp_path / "p", "--trace", trace, code=1)
    assert "claims that a share of 0.990000 stays local" in said
    assert "provenance claims that a share of 0.98 stays local" in said
    assert "provenance claims that at most 0.001 can stay local" in said


def test_claims_about_hops_that_the_trace_does_not_know_are_unproved(tmp_path: Path, trace: Path) -> None:
    run("plan", trace, *MACHINE, "--planner", "affinity", "-o", tmp_path / "p")
    LoadTrace(load_WLE=LoadTrace.load(trace).load_WLE).save(tmp_path / "loads.npz")
    verdicts = facts("verify", tmp_path / "p", "--trace", tmp_path / "loads.npz")["layers"]
    assert [verdict["unproved"] for verdict in verdicts] == [True, True, False]


def test_people_are_told_of_hops_and_why_nothing_moves(tmp_path: Path, trace: Path) -> None:
    said = run("plan", trace, *MACHINE, "--planner", "affinity", "-o", tmp_path / "p")
    assert "at most" in said
    assert re.search(r"hops that stay on a rank: 0\.\d+, at most 0\.\d+ could; searched", said)
    run("plan", trace, *MACHINE, "--planner", "packed", "-o", tmp_path / "q")
    assert "nothing moves" in run(
        "plan", trace, *MACHINE, "--from", tmp_path / "q", "--max-moves", 3, "-o", tmp_path / "r"
    )


def test_an_affinity_plan_keeps_its_cap_in_every_scenario_on_request(tmp_path: Path) -> None:
    choices(2, tokens=2000, layers=4, experts=24, top_k=2).windowed(1000).save(tmp_path / "t.npz")
    machine = ("--nodes", 1, "--ranks-per-node", 4, "--slots", 6, "--balance-cap", 1.08, "--node-worth", 0)
    said = facts("plan", tmp_path / "t.npz", *machine, "--scenarios", 2, "-o", tmp_path / "p")
    assert said["provenance"]["cap"] == "kept"
    assert (said["provenance"]["most_scenarios"], said["provenance"]["node_worth"]) == (2, 0)
    assert facts("score", tmp_path / "t.npz", tmp_path / "p")["worst_window"] <= 1.08 + 1e-9


def test_groups_are_priced_or_strict(tmp_path: Path, trace: Path) -> None:
    priced = facts("plan", trace, *MACHINE, "--groups", 4, "-o", tmp_path / "p")
    strict = facts("plan", trace, *MACHINE, "--groups", 4, "--strict-groups", "-o", tmp_path / "p")
    assert priced["planner"] == "packed, priced groups"
    assert priced["peak_over_mean"] <= strict["peak_over_mean"] + 0.1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--slots", "7"), "32 experts do not fit 4 ranks with 28 slots in all; use slots >= 8 a rank"),
        (("--slots", "x"), "--slots must be numbers with commas between"),
        (("--slots", "9,9"), "--slots lists 2 ranks; there are 4"),
        (("--planner", "best"), "--planner 'best' is not one of auto"),
        (("--balance-cap", "0.5", "--planner", "affinity"), "balance_cap is a peak/mean and must be at least 1"),
        (("--balance-cap", "1.1", "--planner", "packed"), "--balance-cap is for affinity and ilp"),
        (
            ("--balance-cap", "1.01", "--slots", "8", "--speed", "0.1,1,1,1"),
            "keeps a balance cap of 1.01: the bound of lay",
        ),
        (("--groups", "5", "--planner", "packed"), "32 experts do not divide into 5 groups"),
        (("--speed", "1,2"), "--speed needs 4 numbers"),
        (
            ("--memory-gb", "0.07", "--expert-mb", "10"),
            "28 slots in all, where no rank has more slots than its memory holds experts of 10000000 bytes",
        ),
        (("--memory-gb", "1"), "--memory-gb needs --expert-mb"),
        (("--slots", "1000000000"), "--slots must be from 0 to 65536"),
        (("--memory-gb", "nan", "--expert-mb", "1"), "--memory-gb must be finite numbers; got 'nan'"),
        (("--nodes", "99999999"), "ranks; expected at most 65536"),
        (("--nodes", "0"), "--nodes and --ranks-per-node must be at least 1"),
        (("--experts", "4"), "more than --experts 4"),
        (("--from", "x", "--max-moves", "1", "--planner", "packed"), "--planner plans anew; leave it out with --from"),
        (("--from", "x", "--max-moves", "1", "--balance-cap", "1.1"), "--balance-cap plans anew; leave it out"),
        (("--from", "x", "--max-moves", "1", "--groups", "2"), "--groups plans anew; leave it out"),
        (("--from", "x", "--max-moves", "1", "--monolithic"), "--monolithic plans anew; leave it out"),
        (("--max-moves", "3"), "--max-moves needs --from"),
        (("--expert-mb", "3"), "--expert-mb needs --memory-gb"),
        (("--group-price", "0.5"), "--group-price needs --groups"),
        (("--tail", "0.5", "--planner", "packed"), "--tail is for robust; got --planner packed"),
        (("--fan-out", "0.5", "--planner", "ilp"), "--fan-out is for affinity; got --planner ilp"),
        (("--monolithic", "--planner", "packed"), "--monolithic is for ilp; got --planner packed"),
        (("--node-worth", "0.5", "--planner", "ilp"), "--node-worth is for affinity; got --planner ilp"),
        (("--scenarios", "2", "--planner", "packed"), "--scenarios is for robust and affinity; got --planner packed"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2_and_nothing_is_written(
    tmp_path: Path, trace: Path, words: tuple[str, ...], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    said = run("plan", trace, *MACHINE, *words, "-o", tmp_path / "p", code=2)
    assert message in said
    assert said.startswith("moe-place: ")
    assert len(said.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_recording_names_file_and_field_and_nothing_is_written(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"logical_count": [[1, -1]]}')
    said = run("plan", bad, *MACHINE, "-o", tmp_path / "p", code=2)
    assert "bad.json: field 'logical_count' holds the negative number -1" in said
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]
    assert "No such file" in run("plan", tmp_path / "none.npz", *MACHINE, "-o", tmp_path / "p", code=2)
    assert "cannot write there" in run("plan", bad, *MACHINE, "-o", tmp_path / "no" / "p", code=2)


def test_where_plan_or_sidecar_cannot_go_neither_is_written(tmp_path: Path, trace: Path) -> None:
    (tmp_path / "z.json.sidecar.json").mkdir()
    before = sorted(tmp_path.iterdir())
    said = run("plan", trace, *MACHINE, "-o", tmp_path / "z.json", code=2)
    assert f"{tmp_path / 'z.json.sidecar.json'}: cannot write there" in said
    assert sorted(tmp_path.iterdir()) == before
    run("plan", trace, *MACHINE, "-o", tmp_path / "p")
    before = sorted(tmp_path.iterdir())
    assert "cannot write there" in run("convert", tmp_path / "p", tmp_path / "z.json", "--to", "plan", code=2)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot write there" in run("plan", tmp_path / "none.npz", *MACHINE, "-o", tmp_path / "p", code=2)


def test_recordings_given_together_are_merged(tmp_path: Path) -> None:
    one, two = (drawn_loads(seed, layers=2) for seed in (0, 1))
    one.save(tmp_path / "1.npz")
    two.save(tmp_path / "2.npz")
    said = facts("plan", tmp_path / "1.npz", tmp_path / "2.npz", *MACHINE, "-o", tmp_path / "p")
    assert said["provenance"]["trace"] == merge([one, two]).fingerprint
    assert said["planner"] == "robust"


def test_the_ranks_files_of_one_recording_are_one_set_of_windows(tmp_path: Path) -> None:
    for rank in (0, 1):
        counts = np.arange(32)[None] * (rank + 1) + 1
        records = [{"forward_pass_id": 3, "rank": rank, "global_physical_count": counts.tolist()}]
        document = {"records": records, "last_physical_to_logical_map": [list(range(32))]}
        (tmp_path / f"{rank}.json").write_text(json.dumps(document))
    both = tmp_path / "0.json", tmp_path / "1.json"
    assert facts("plan", *both, *MACHINE, "-o", tmp_path / "p")["planner"] == "packed"


def test_tables_of_loads_of_different_models_are_not_merged(tmp_path: Path) -> None:
    for experts in (16, 32):
        drawn_loads(0, layers=2, experts=experts).save(tmp_path / f"{experts}.npz")
    said = run("plan", tmp_path / "16.npz", tmp_path / "32.npz", *MACHINE, "-o", tmp_path / "p", code=2)
    assert "merge traces of one model" in said


def test_convert_writes_for_engines_and_keeps_traces(tmp_path: Path, trace: Path) -> None:
    run("plan", trace, *MACHINE, "--planner", "packed", "-o", tmp_path / "p")
    run("convert", tmp_path / "p", tmp_path / "p.yaml", "--to", "trtllm")
    run("convert", tmp_path / "p.yaml", tmp_path / "back", "--to", "plan", "--ranks", 4)
    assert Plan.load(tmp_path / "back").fingerprint == Plan.load(tmp_path / "p").fingerprint
    np.save(tmp_path / "w.npy", np.array([[1.0, 2, 3]]))
    run("convert", tmp_path / "w.npy", tmp_path / "w.npz", "--to", "trace")
    assert LoadTrace.load(tmp_path / "w.npz").load_LE.tolist() == [[1, 2, 3]]


def test_times_say_what_was_measured_and_what_was_modelled(tmp_path: Path, trace: Path) -> None:
    run("plan", trace, *MACHINE, "-o", tmp_path / "p")
    guessed = facts("simulate", trace, tmp_path / "p")
    assert guessed["measured"] == []
    assert len(guessed["step_seconds"]) == guessed["windows"] == 4
    curve = facts("calibrate", "-o", tmp_path / "c", "--dim", 16, "--hidden", 8, "--rows", "1,8,64")
    assert curve["source"].startswith("measured: ")
    timed = facts("simulate", trace, tmp_path / "p", "--curve", tmp_path / "c", "--dim", 16, "--hidden", 8)
    assert len(timed["measured"]) == 1
    other = run("simulate", trace, tmp_path / "p", "--curve", tmp_path / "c", "--dim", 16, "--hidden", 9, code=2)
    assert "c: not a curve for this: the curve is of experts of 16 x 8, not 16 x 9" in other
    (tmp_path / "c").write_text('{"rows": [1, 2], "seconds": [1, 2], "source": "measured"}')
    assert "field 'dim' is missing" in run("simulate", trace, tmp_path / "p", "--curve", tmp_path / "c", code=2)
    assert timed["seconds"] == pytest.approx(timed["compute_seconds"] + timed["link_seconds"])
    sizes = facts("size", trace, "--ranks", "2,4", "--spare", "0,4", "--ranks-per-node", 2)["sizes"]
    assert [(each["ranks"], each["slots"]) for each in sizes] == [(2, 32), (2, 36), (4, 32), (4, 36)]
    assert sizes[0]["expert_bytes"] == 16 * 3 * (3 * 2048 * 1408 * 2)
    advice = facts("advise", trace, "--nodes", 1, "--ranks-per-node", 4)
    assert advice["choice"] in {option["name"] for option in advice["options"]}


@pytest.mark.parametrize("columns", [80, 30])
def test_a_table_cuts_nothing_off_however_narrow_the_terminal(
    trace: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(console.OUT, "width", columns)
    advice = facts("advise", trace, "--ranks-per-node", 4, "--slots", 9)
    said = run("advise", trace, "--ranks-per-node", 4, "--slots", 9)
    assert "…" not in said
    for option in advice["options"]:
        assert {option["name"], f"{1e6 * option['seconds']:.4g}", f"{option['peak_over_mean']:.4g}"} <= set(
            said.split()
        )
    assert columns < 80 or all(len(line) <= columns for line in said.splitlines() if line[:1] in "┏┃┡│└")


@pytest.fixture
def page(tmp_path: Path, trace: Path) -> Path:
    pytest.importorskip("matplotlib", reason="the report's pictures need matplotlib")
    run("plan", trace, *MACHINE, "--planner", "affinity", "-o", tmp_path / "p")
    run("report", trace, tmp_path / "p", "-o", tmp_path / "report.html")
    return tmp_path / "report.html"


def test_a_report_is_one_page_that_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert text.count("<img ") == text.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    assert "Certificates" in text


def test_a_browser_shows_the_report_with_its_pictures(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on PATH")
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    text = page.read_text()
    probe = "<script>document.title = [...document.images].map(i => i.naturalWidth > 99).join()</script></body>"
    page.write_text(text.replace("</body>", probe))
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet,
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>true,true,true</title>" in shown.stdout
