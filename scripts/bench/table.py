"""How every benchmark measures and prints: candidates in turn, round after round; ratios; the machine above."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


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


def rounds(candidates: Mapping[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Each candidate once a round, so that a slow moment hits all alike; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(count + 1):
        for name, candidate in candidates.items():
            taken = candidate()
            if turn:
                seconds[name].append(taken)
    return seconds


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of this candidate's time by the base's in the same round."""
    return statistics.median(own / other for own, other in zip(seconds, base, strict=True))


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table that is Markdown as it stands."""
    print(f"\n### {title}\n\n{machine()}\n")
    print("| " + " | ".join(heads) + " |")
    print("|" + "-|" * len(heads))
    for row in rows:
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
