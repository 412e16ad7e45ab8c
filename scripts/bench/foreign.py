"""Foreign: how busy other programs keep the machine while a benchmark runs."""

from __future__ import annotations

import os
from pathlib import Path


class Foreign:
    """Counts from when it is made. read() -> the share of all CPUs since then that neither this program nor the
    processes of its group took; nan where the system does not tell."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> float:
        busy, own, total = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / total if total else float("nan")

    def _now(self) -> tuple[float, float, float]:
        """Ticks of all CPUs that were busy, of this process group, and of all CPUs."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0, 0.0, 0.0
        tick_F = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
        total, idle = sum(tick_F), tick_F[3] + tick_F[4]
        return total - idle, sum(map(_ticks_of, Path("/proc").glob("[0-9]*"))), total


def _ticks_of(process: Path) -> float:
    """User and system time of a process and of its children that ended and were waited for, if it is of this group and
    still there. So a child's time is its parent's once it ended, whichever process of the group that is."""
    try:
        fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(map(float, fields[11:15])) if int(fields[2]) == os.getpgrp() else 0.0
