"""How every benchmark measures and prints: candidates in turn, round after round; ratios; the machine above.

Every table is Markdown as it stands, and with `--json FILE` the whole run is one JSON besides: machine, arguments,
tables, and each candidate's seconds in each round.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch

from routing import python_only
from scripts.bench.foreign import Foreign

T = TypeVar("T")

ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_run: dict[str, Any] = {"samples": [], "tables": []}
_markdown: list[str] = []
_foreign = Foreign()


def machine() -> str:
    """The line above every table."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{model}, {os.cpu_count()} cores, {device}; torch {torch.__version__}, python {platform.python_version()}"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of every benchmark: its docstring, and where the JSON goes."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the whole run here too")
    return arguments


def in_python(once: Callable[[], T]) -> Callable[[], T]:
    """Without the compiled path, whether or not it is built."""

    def run() -> T:
        with python_only():
            return once()

    return run


def cpu_seconds(run: Callable[[], object], repeats: int = 1) -> Callable[[], float]:
    """CPU seconds of this process that one run takes, the mean of some in a row."""

    def once() -> float:
        start = time.process_time()
        for _ in range(repeats):
            run()
        return (time.process_time() - start) / repeats

    return once


@dataclass(frozen=True)
class Samples:
    """seconds: of each candidate in each round. foreign: what share of the CPUs other programs took in each round."""

    seconds: dict[str, list[float]]
    foreign: list[float]


def interleaved(
    candidates: Mapping[str, Callable[[], float]],
    count: int,
    *,
    budget: float = inf,
    warm: float | None = None,
    agree: Callable[[float], float] = float,
) -> Samples:
    """Each candidate once a round, so that a slow moment hits all alike; the first round warms up and is dropped. In
    another order each round, the same on every process: what runs before leaves caches and the allocator's memory.

    budget: seconds for all rounds; as many are made as fit, one at least. warm: what a round takes, where the
    candidates are warm already. agree: makes one number of what many processes found, so that all stop together.
    """
    end = time.monotonic() + budget
    if warm is None:
        start = time.monotonic()
        for candidate in candidates.values():
            candidate()
        warm = time.monotonic() - start
    left = agree((end - time.monotonic()) / max(warm, 1e-9))
    samples, shuffled = Samples({name: [] for name in candidates}, []), random.Random(0)
    for _ in range(max(1, min(count, round(min(left, count))))):
        watch = Foreign()
        for name in shuffled.sample(list(candidates), len(candidates)):
            samples.seconds[name].append(candidates[name]())
        samples.foreign.append(watch.read())
    _run["samples"].append({"seconds": samples.seconds, "foreign_cpu": samples.foreign})
    return samples


def rounds(candidates: Mapping[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """The seconds alone of so many rounds."""
    return interleaved(candidates, count).seconds


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of this candidate's time by the base's in the same round."""
    return statistics.median(own / other for own, other in zip(seconds, base, strict=True))


def band(again: Sequence[float], own: Sequence[float]) -> float:
    """The noise: by how much two identical candidates differ in a round, the median over the rounds."""
    return statistics.median(abs(one / other - 1) for one, other in zip(again, own, strict=True))


def against(ratio: float, noise: float) -> str:
    """A ratio, marked where it lies within the noise."""
    return f"{'≈' if abs(ratio - 1) <= noise else ''}{ratio:.2f}"


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table that is Markdown as it stands. Above it the machine, and how busy other programs kept it."""
    busy = _foreign.read()
    tuned = ", ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ)
    note = f"Other programs took {busy:.0%} of the CPUs."
    if "allocator" not in heads:
        note += f" Allocator: {tuned or 'as glibc has it'}."
    lines = [f"\n### {title}\n\n{machine()}. {note}\n", "| " + " | ".join(heads) + " |", "|" + "-|" * len(heads)]
    for row in rows:
        lines.append("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print("\n".join(lines), flush=True)
    _run["tables"].append({"title": title, "foreign_cpu": busy, "heads": list(heads), "rows": [list(r) for r in rows]})
    _markdown.append("\n".join(lines))


def versions() -> dict[str, str]:
    """Of what a result may depend on; the commit of the working tree, with a + where it differs from it."""
    found = {"torch": str(torch.__version__)}  # with its build, which a package from PyPI does not tell
    for name in ("numpy", "transformers", "megatron-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        tree = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found["commit"] = tree.stdout.strip()
    return found


def finish(arguments: argparse.Namespace, **more: object) -> None:
    """Write the JSON, if one was asked for, and the tables as they were printed beside it, in a file .md."""
    if arguments.json is None:
        return
    given = {name: str(value) for name, value in vars(arguments).items() if name != "json"}
    flags = {name: os.environ[name] for name in (*ALLOCATOR, "OMP_NUM_THREADS") if name in os.environ}
    about = {"machine": machine(), "versions": versions(), "arguments": given, "environment": flags}
    whole = {**about, **more, **_run}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(whole, default=str) + "\n")
    arguments.json.with_suffix(".md").write_text("\n".join(_markdown) + "\n")
