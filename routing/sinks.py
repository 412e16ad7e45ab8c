"""Sinks: where a step's readings go. A sink is called with the step and layer -> metric -> number."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Readings = Mapping[str, Mapping[str, float]]
# Worth a colour where they are not 0.
ALARMS = ("dead", "flat", "saturated")


class Sink(Protocol):
    def __call__(self, step: int, readings: Readings) -> None:
        """readings: what routing.readings gave, and what routing.over_layers made of it."""


@dataclass(frozen=True, kw_only=True)
class Console:
    """A table on stdout, a row for each layer, with alarms in red. As wide as its numbers: none is cut short."""

    def __call__(self, step: int, readings: Readings) -> None:
        from rich.console import Console as Screen
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        metrics = list(dict.fromkeys(name for reading in readings.values() for name in reading))
        table = Table(title=f"step {step}", title_justify="left")
        table.add_column("layer", no_wrap=True)
        for name in metrics:
            table.add_column(name, justify="right", no_wrap=True)
        for layer, reading in readings.items():
            cells = [_cell(reading, name) for name in metrics]
            alarms = [name in ALARMS and bool(reading.get(name)) for name in metrics]
            styled = (Text(cell, style="bold red" if alarm else "") for cell, alarm in zip(cells, alarms, strict=True))
            table.add_row(Text(str(layer)), *styled)
        endless = Screen(width=10_000)
        wide = Measurement.get(endless, endless.options, table).maximum
        Screen(width=max(wide, Screen().width)).print(table)


@dataclass(frozen=True)
class JsonLines:
    """A line of JSON for each step, {"step": 7, "readings": {layer: {metric: number}}}, appended and flushed.

    A number that JSON does not know becomes null. A line that a crash cut short is ended before the next is written, so
    it spoils no other.
    """

    path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        path = Path(self.path)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: cannot write readings there; give a file in a folder that exists")

    def __call__(self, step: int, readings: Readings) -> None:
        numbers = {
            str(layer): {name: _finite(value) for name, value in reading.items()} for layer, reading in readings.items()
        }
        line = json.dumps({"step": int(step), "readings": numbers}, allow_nan=False).encode() + b"\n"
        with Path(self.path).open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)


@dataclass(frozen=True)
class TensorBoard:
    """Scalars metric/layer in a folder that TensorBoard reads: the layers of a metric side by side."""

    folder: str | os.PathLike[str]
    writer: SummaryWriter = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("TensorBoard(...) needs the package tensorboard; pip install tensorboard") from None
        object.__setattr__(self, "writer", SummaryWriter(os.fspath(self.folder)))

    def __call__(self, step: int, readings: Readings) -> None:
        for layer, reading in readings.items():
            for name, value in reading.items():
                self.writer.add_scalar(f"{name}/{layer}", float(value), step)
        self.writer.flush()


def _cell(reading: Mapping[str, float], name: str) -> str:
    return f"{float(reading[name]):.4g}" if name in reading else ""


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
