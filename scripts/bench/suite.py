"""The named workloads, ours beside the peers that are installed, in one table and one JSON.

    python -m scripts.bench.suite                          # all, on two quiet cores in less than 15 minutes
    python -m scripts.bench.suite --only ep2-95:4 tiny-8x2
    python -m scripts.bench.suite --quick                  # forward, some loads, one allocator: some 4 minutes
    python -m scripts.bench.suite --llep PATH              # LLEP's planner too, from a file of yours: see llep.py

tiny-8x2, wide-64x8, fine-128x8, decode-256: experts on one thread, CPU seconds, over dense matmuls of the same FLOPs,
under glibc's allocator as it is and, with backward, tuned. ep2-*, ep4-*: a layer on 2 and 4 processes; of ep4-* only
some on fewer than four CPUs, unless they are named. bip-*: prices of a batch. plan-*: who computes what. A ratio is the
median of the rounds', candidates in turn. "vs best peer": times faster than the fastest of the others. Noise: by how
much two copies of ours differ in a round; what is within it has the mark ≈. A wall time counts where other programs
took at most 5 % of the CPUs, and needs three such rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.loads import LOADS
from scripts.bench.measured import HEADS, KINDS, Measured, shared
from scripts.bench.part import PARTS
from scripts.bench.table import ALLOCATOR, finish, machine, parser, show, versions

ALLOCATORS = ("default", "tuned")
TUNED = dict(zip(ALLOCATOR, ("0", "100000000000", "268435456"), strict=True))
WEIGHT = {"plan": 3.0, "bip": 11.0, "ep2": 12.0, "ep4": 12.0, "tiny": 43.0, "wide": 155.0, "fine": 90.0, "decode": 10.0}
STEPS = {f"ep{ranks}-{name}": load.steps for ranks in (2, 4) for name, load in LOADS.items()}
QUICK = ("plan-256x8", "bip-8k64", "ep2-bal", "ep2-95:4", "ep2-zipf", "tiny-8x2", "wide-64x8", "decode-256")
NAMES = [name for names in PARTS.values() for name in names]
CROWDED = ("ep4-bal", "ep4-95:4", "ep4-hot-rank", "ep4-zero-rank", "ep4-zipf", "ep4-rotation")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one child process measures."""

    part: str
    allocator: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def weight(self) -> float:
        """Seconds that three rounds take, about, on two quiet cores."""
        part = 0.7 if self.allocator == "tuned" and len(self.kinds) == 1 else 1.0
        return part * sum(WEIGHT[name.split("-")[0]] * STEPS.get(name, 1) for name in self.names) + 8


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    arguments.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=ALLOCATORS, help="of the experts")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--minutes", type=float, default=14.0, help="for all of it, about")
    arguments.add_argument("--rounds", type=int, default=5, help="at most")
    arguments.add_argument("--llep", metavar="PATH[:FUNCTION]")
    arguments.set_defaults(json=Path("out/bench/suite.json"))
    given = arguments.parse_args(argv)
    print(machine(), ", ".join(f"{name} {version}" for name, version in versions().items()), sep="\n", flush=True)
    start = time.monotonic()
    allocators = given.allocators[:1] if given.quick else given.allocators
    jobs = jobs_of(given.only or (QUICK if given.quick else usual()), allocators, KINDS[:1] if given.quick else KINDS)
    minutes = min(given.minutes, 4.0) if given.quick else given.minutes
    found: list[tuple[Job, Measured]] = []
    failed: list[list[object]] = []
    for job, seconds in shared(60 * minutes, {job: job.weight for job in jobs}):
        print(f"{time.monotonic() - start:.0f} s: {job.part}, allocator {job.allocator}", flush=True)
        measured, reason = done(job, seconds, given)
        found += [(job, one) for one in measured]
        failed += [[f"{job.part}, allocator {job.allocator}", "-", reason]] if reason else []
    report(found, failed)
    took = time.monotonic() - start
    print(f"\n{took:.0f} s; written: {given.json}")
    finish(given, seconds=took, measured=[{"allocator": job.allocator, **vars(one)} for job, one in found])


def usual() -> list[str]:
    crowded = (os.cpu_count() or 1) < 4
    return [name for name in NAMES if name in CROWDED or not (crowded and name.startswith("ep4"))]


def jobs_of(names: Sequence[str], allocators: Sequence[str], kinds: Sequence[str]) -> list[Job]:
    """Tuned, with backward alone where that is among them: there it weighs most."""
    jobs = []
    for part, known in PARTS.items():
        chosen = tuple(name for name in known if name in names)
        for allocator in allocators if part == "experts" else ALLOCATORS[:1]:
            wanted = tuple(kinds[-1:] if allocator == "tuned" else kinds)
            jobs += [Job(part=part, allocator=allocator, names=chosen, kinds=wanted)] if chosen else []
    return jobs


def done(job: Job, seconds: float, given: argparse.Namespace) -> tuple[list[Measured], str]:
    """-> what it measured, and why not more"""
    environment = {name: value for name, value in os.environ.items() if name not in TUNED} | {"OMP_NUM_THREADS": "1"}
    environment |= TUNED if job.allocator == "tuned" else {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured"
        command = [sys.executable, "-m", "scripts.bench.part", job.part, *job.names, "--out", str(out)]
        command += ["--seconds", str(seconds), "--rounds", str(given.rounds)]
        command += ["--kinds", *job.kinds]
        command += ["--llep", given.llep] if given.llep else []
        reason = ""
        try:
            ended = subprocess.run(
                command, check=False, env=environment, timeout=2 * seconds + 120, stderr=subprocess.PIPE, text=True
            )
            reason = last_line(ended.stderr) if ended.returncode else ""
        except subprocess.TimeoutExpired:
            reason = "stopped: it took more than twice its time"
        lines = out.read_text().splitlines() if out.exists() else []
    return [Measured(**json.loads(line)) for line in lines], reason


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it died"])[-1]


def report(found: Sequence[tuple[Job, Measured]], failed: Sequence[Sequence[object]]) -> None:
    show("The named workloads", HEADS, [one.row(job.allocator) for job, one in found])
    why: Mapping[tuple[str, str], list[str]] = defaultdict(list)
    for _, one in found:
        for peer, reason in one.absent.items():
            place = f"{one.workload} ({one.what})"
            if place not in why[peer, reason]:
                why[peer, reason].append(place)
    left: list[Sequence[Any]] = [["; ".join(places), peer, reason] for (peer, reason), places in why.items()]
    show("Left out", ["workload", "peer", "reason"], [*left, *failed] or [["nothing", "-", "-"]])


if __name__ == "__main__":
    main()
