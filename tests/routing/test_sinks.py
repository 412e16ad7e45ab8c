"""Sinks: what was read arrives, whatever the numbers are."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from routing.sinks import Console, JsonLines, Sink, TensorBoard

pytestmark = pytest.mark.fast
READINGS = {"0": {"max_vio": 0.25, "dead": 0.0}, "blocks.1": {"max_vio": 12.5, "dead": 3.0, "dual_gap": 1e-9}}


def test_the_console_shows_every_number_of_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    Console()(7, READINGS)
    shown = capsys.readouterr().out
    for word in ("step 7", "max_vio", "dual_gap", "blocks.1", "0.25", "12.5", "1e-09"):
        assert word in shown


def test_the_console_cuts_no_number_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    Console()(1, {"[layer]": {f"a_long_metric_name_{n}": n + 0.1234 for n in range(20)}})
    shown = capsys.readouterr().out
    assert "[layer]" in shown, "a layer's name is no markup"
    for n in range(20):
        assert f"a_long_metric_name_{n} " in shown
        assert f"{n + 0.1234:.4g}" in shown


def test_the_console_paints_alarms_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    Console()(1, {"0": {"max_vio": 7.0, "dead": 0.0}, "1": {"max_vio": 8.0, "dead": 9.0}})
    painted = [piece.split("\x1b")[0].strip() for piece in capsys.readouterr().out.split("\x1b[1;31m")[1:]]
    assert [text for text in painted if text] == ["9"]


def test_each_step_is_a_line_of_json_that_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    sink = JsonLines(path)
    for step in (1, 2):
        sink(step, READINGS)
        lines = path.read_text().splitlines()
        assert len(lines) == step
        assert json.loads(lines[-1]) == {"step": step, "readings": READINGS}
    JsonLines(str(path))(3, {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3], "a resumed run appends"


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "log.jsonl")
    sink(0, {"0": {"a": math.nan, "b": math.inf, "c": float(np.float32(0.5)), "d": -math.inf}})
    assert json.loads((tmp_path / "log.jsonl").read_text())["readings"]["0"] == {
        "a": None,
        "b": None,
        "c": 0.5,
        "d": None,
    }


def test_a_line_cut_short_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "readings": {}}\n{"step": 2, "rea')
    JsonLines(path)(3, READINGS)
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 3
    assert json.loads(path.read_text().splitlines()[0])["step"] == 1


def test_a_file_that_cannot_be_is_refused_before_the_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "log.jsonl"):
        with pytest.raises(ValueError, match="in a folder that exists"):
            JsonLines(path)


def test_without_tensorboard_one_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


class Writer:
    """Stands in for SummaryWriter where tensorboard is not installed."""

    def __init__(self, folder: str) -> None:
        self.folder, self.wrote, self.flushed = folder, [], 0

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.wrote.append((tag, value, step))

    def flush(self) -> None:
        self.flushed += 1


def test_tensorboard_has_the_layers_of_a_metric_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    sink = TensorBoard(tmp_path)
    sink(5, READINGS)
    assert sink.writer.folder == str(tmp_path)
    assert ("max_vio/0", 0.25, 5) in sink.writer.wrote
    assert ("dual_gap/blocks.1", 1e-9, 5) in sink.writer.wrote
    assert len(sink.writer.wrote) == 5
    assert sink.writer.flushed == 1


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_writes_a_file(tmp_path: Path) -> None:
    TensorBoard(tmp_path)(1, READINGS)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_every_sink_is_called_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks: list[Sink] = [Console(), JsonLines(tmp_path / "log.jsonl")]
    for sink in sinks:
        sink(0, READINGS)
    assert capsys.readouterr().out
    assert (tmp_path / "log.jsonl").exists()
