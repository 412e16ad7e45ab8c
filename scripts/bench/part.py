"""One part of the suite, in a process of its own: the allocator's settings are read when a process starts.

python -m scripts.bench.part experts --seconds 60 --rounds 5 --out FILE tiny-8x2 decode-256

Writes a line of JSON for each measurement as soon as it is made, so that what is cut short has left what it found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from scripts.bench import experts, layer, planner, router
from scripts.bench.loads import LOADS
from scripts.bench.measured import KINDS, Measured

PARTS: dict[str, tuple[str, ...]] = {
    "planner": tuple(planner.PLANS),
    "router": tuple(router.BATCHES),
    "layer": tuple(f"ep{ranks}-{load}" for ranks in (2, 4) for load in LOADS),
    "experts": tuple(experts.WORKLOADS),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=[*PARTS])
    arguments.add_argument("names", nargs="+")
    arguments.add_argument("--seconds", type=float, required=True)
    arguments.add_argument("--rounds", type=int, required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments.add_argument("--llep")
    given = arguments.parse_args()
    warnings.filterwarnings("ignore")  # of other projects, as they are imported
    with given.out.open("a") as out:
        for measured in measurements(given):
            print(json.dumps(dataclasses.asdict(measured)), file=out, flush=True)
            milliseconds = statistics.median(measured.seconds["ours"]) * 1e3
            what = f"{measured.workload}, {measured.what}, {measured.clock}"
            print(f"  {what}: {milliseconds:.4g} ms, {len(measured.foreign)} rounds", flush=True)


def measurements(given: argparse.Namespace) -> Iterator[Measured]:
    suites: dict[str, Callable[..., Iterator[Measured]]] = {
        "planner": partial(planner.suite, their=given.llep),
        "router": router.suite,
        "layer": layer.suite,
        "experts": experts.suite,
    }
    return suites[given.part](given.names, given.seconds, given.rounds, kinds=given.kinds)


if __name__ == "__main__":
    main()
