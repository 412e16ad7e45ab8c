"""The benchmark of one GPU, on a CPU: every line of it runs, and what it says of virtual ranks adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routing import AtHome, LeastLoaded
from scripts.bench import gpu, table
from scripts.bench.clock import Clock
from scripts.bench.published import TINY, Layer, experts_of
from scripts.bench.replay import Stage, counts, in_order, spread, travel_seconds


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The JSON of a dry run with this budget, by title."""
    monkeypatch.setattr(table, "_run", {"samples": [], "tables": []})
    monkeypatch.setattr(table, "_markdown", [])
    monkeypatch.setattr(Layer, "hugging_face", lambda self, implementation: self.torch_grouped)
    file = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--budget", str(request.param), "--json", str(file)])
    tables = json.loads(file.read_text())["tables"]
    assert all(one["title"] in file.with_suffix(".md").read_text() for one in tables)
    return {one["title"]: [dict(zip(one["heads"], row, strict=True)) for row in one["rows"]] for one in tables}


@pytest.mark.parametrize("told", [600], indirect=True)
def test_a_dry_run_fills_every_table_and_quotes_no_speed_of_many_devices(told: dict[str, Any]) -> None:
    layers = [rows for title, rows in told.items() if title.startswith("Layer, ")]
    assert [len(rows) for rows in layers] == [9, 9]
    assert all(float(row["error"]) < 1e-5 for rows in layers for row in rows)
    assert not any(row[f"{who}, × ceiling"] == "-" for rows in layers for row in rows for who in gpu.COLUMNS)
    title, replays = next((title, rows) for title, rows in told.items() if title.startswith("Replay"))
    assert len(replays) == 2 * 9 * 2
    assert all(row["failed"] == "-" and row["rows, most"] >= row["rows, mean"] for row in replays)
    assert "MODELLED" in title
    assert not any("speed" in head or "faster" in head or "×" in head for head in gpu.REPLAY_HEADS)
    assert told["Left out for want of time"] == [{"what": "nothing"}]


@pytest.mark.parametrize("told", [0], indirect=True)
def test_when_there_is_no_time_it_says_what_it_left_out(told: dict[str, Any]) -> None:
    left = [row["what"] for row in told["Left out for want of time"]]
    assert len(left) == len(set(left)) == 2 * 9 + 1 + 2 * 9
    assert not any(rows for title, rows in told.items() if title.startswith(("Layer, ", "Replay")))


@pytest.mark.fast
def test_a_candidate_that_fails_is_a_reason_and_the_others_are_timed() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nand a long story")

    found = Clock(torch.device("cpu"), 60).medians({"sound": lambda: None, "broken": broken}, 1)
    assert isinstance(found["sound"], float)
    assert found["broken"] == "RuntimeError: no such kernel"


@pytest.mark.fast
@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 64])
def test_the_ranks_played_first_are_spread_and_all_come_once(ranks: int) -> None:
    assert sorted(spread(ranks)) == list(range(ranks))
    assert ranks < 3 or spread(ranks)[1] == (1 << (ranks - 1).bit_length()) // 2


@pytest.mark.fast
def test_virtual_ranks_compute_all_rows_and_only_what_moves_is_modelled() -> None:
    shape, clock = TINY["qwen30"], Clock(torch.device("cpu"), 60)
    count_RE, placement = counts("95:4", shape, 4, 16), in_order(shape, 4)
    for assigner, visits in ((AtHome(), False), (LeastLoaded(), True)):
        plan = assigner(count_RE, placement)
        guests = max([sum(loan.borrower == rank for loan in plan.loans(placement)) for rank in range(4)])
        stage = Stage(shape, 4, guests, clock, torch.float32)
        played = stage.play(plan, placement, 30, backward=True)
        assert (len(played.seconds), played.failed, played.loans > 0) == (4, "", visits)
        assert played.rows_R.sum() == played.computed == count_RE.sum()
    alone = AtHome()(np.array([[3] * shape.experts]), in_order(shape, 1))
    assert travel_seconds(alone, in_order(shape, 1), shape, 100, backward=True) == 0.0


@pytest.mark.fast
def test_the_published_layers_candidates_are_one_function() -> None:
    shape = TINY["dsv3r"]
    experts = experts_of(shape, shape.held, torch.device("cpu"), torch.float32)
    layer = Layer(shape, "zipf", experts, backward=True)
    assert layer.error() < 1e-6
    for run in (layer.step(layer.torch_grouped), layer.ceiling()):
        run()
