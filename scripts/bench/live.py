"""Claim: a service that watches its experts and moves them keeps its ranks even, and loses nothing when ranks go.

    python -m scripts.bench.live -o out/live                     # trains a small model first, some minutes
    python -m scripts.bench.live -o out/live --from out/bip      # or serves one that scripts.train made

Writes report.html to the folder: the tables below with pictures, in one file that needs no network and no script.
One stream of requests, whose topics drift, is served in each way, round after round; answers in float64 are those of
one process, or this fails. `throughput` and `p99 latency` are by the processor time of the busiest rank of each step,
as if each rank had a processor to itself; `shared cores` by the clock on the wall of this machine.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from moe import World
from placement import LoadTrace, Plan, Robust, Topology
from scripts.bench.table import finish, machine, parser, show
from scripts.generate import Served
from scripts.serving.batch import Continuous
from scripts.serving.compare import HEADS, Watched, recorded, require_equal_answers, table_of, watch, ways
from scripts.serving.member import Part
from scripts.serving.page import page, picture_of_loads, picture_of_members, picture_of_time, table
from scripts.serving.requests import Drift, Poisson, Request, stream
from scripts.serving.resize import HEADS as EVENTS
from scripts.serving.resize import resize, table_of_events, verdict
from scripts.text import by_package
from scripts.train import MODEL, Run, Trainer, small, train

EXPERTS, TOP_K = 16, 2
SIZES = (2, 4, 3)  # and then one is killed


def main() -> None:
    arguments = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    arguments.output.mkdir(parents=True, exist_ok=True)
    source = trained(arguments)
    sections = compared(source, arguments) + resized(source, arguments)
    text = page("The live loop", f"{machine()}. Ranks are processes of this machine, over gloo.", sections)
    (arguments.output / "report.html").write_text(text)
    print(f"\n{arguments.output / 'report.html'}")
    finish(arguments)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("-o", "--output", type=Path, required=True)
    options.add_argument("--from", dest="source", type=Path, help="the folder of a run of scripts.train")
    options.add_argument("--train-steps", type=int, default=300, help="where no model is given")
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--requests", type=int, default=400)
    options.add_argument("--rate", type=float, default=3.0, help="requests a step, over all ranks")
    options.add_argument("--drift", type=int, default=100, help="requests until another topic is hot")
    options.add_argument("--replan-every", type=int, default=20, help="steps")
    options.add_argument("--slots", type=int, default=24, help="requests at a time, on each rank")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--limit", type=float, default=600.0, help="seconds for the resizing, before it is given up")
    return options.parse_args()


def trained(arguments: argparse.Namespace) -> Path:
    """-> the folder of a model; one is trained there unless it was."""
    if arguments.source is not None:
        return Path(arguments.source)
    folder: Path = arguments.output / "model"
    if not (folder / MODEL).exists():
        shape = replace(small("loss-free", experts=EXPERTS, top_k=TOP_K), layers=2, length=64)
        shape = replace(shape, moe=replace(shape.moe, hidden=256))
        train(Trainer(Run(shape=shape, steps=arguments.train_steps, sequences=32), None), folder)
    return folder


def requests_of(arguments: argparse.Namespace, seed: int) -> tuple[Request, ...]:
    drift = Drift(period=arguments.drift, hot=0.9)
    return stream(
        by_package(), arguments.requests, Poisson(rate=arguments.rate), drift, prompt=(8, 24), new_tokens=(8, 32),
        seed=seed,
    )  # fmt: skip


def compared(source: Path, arguments: argparse.Namespace) -> list[str]:
    """-> parts of the page"""
    served = Served(
        schedule=Continuous(slots=arguments.slots, tokens=3 * arguments.slots), clock="steps", dtype=torch.float64
    )
    _, earlier = recorded(source, requests_of(arguments, seed=1), served, arguments.ranks)
    requests = requests_of(arguments, seed=0)
    truth, _ = recorded(source, requests, served, arguments.ranks)
    runs: dict[str, list[Watched]] = {}
    with World(arguments.ranks, timeout=timedelta(minutes=10)) as world:
        candidates = ways(served, plan_for(earlier, arguments.ranks), arguments.replan_every)
        watch(world, source, requests, served)  # the first run warms up
        for turn in range(arguments.rounds):
            for name, way in candidates.items():
                runs.setdefault(name, []).append(watch(world, source, requests, way))
                print(f"round {turn + 1}, {name}: peak/mean {runs[name][-1].peak:.2f}", flush=True)
    require_equal_answers(runs, truth)
    rows = table_of(runs)
    title = f"{len(requests)} requests, {earlier.num_experts} experts on {arguments.ranks} ranks"
    show(title, HEADS, rows)
    note = "Every answer of every way is the answer of one process. The last row is the noise of this run."
    return [
        table("While topics drift", f"{title}. {note}", HEADS, rows),
        picture_of_loads({name: own[0] for name, own in runs.items()}),
        picture_of_time({name: own[0] for name, own in runs.items()}),
    ]


def resized(source: Path, arguments: argparse.Namespace) -> list[str]:
    """-> parts of the page"""
    requests = requests_of(arguments, seed=2)
    served = Served(schedule=Continuous(slots=8, tokens=32), dtype=torch.float64)
    truth, _ = recorded(source, requests, replace(served, clock="steps"), 1)
    part = Part(address="", source=source, schedule=served.schedule)
    seen = resize(part, requests, truth, SIZES, limit=arguments.limit)
    rows = table_of_events(seen)
    show(f"Resized under load. {verdict(seen)}", EVENTS, rows)
    return [table("While ranks come, go and die", verdict(seen), EVENTS, rows), picture_of_members(seen)]


def plan_for(earlier: LoadTrace, ranks: int) -> Plan:
    topology = Topology.fitting(num_experts=earlier.num_experts, ranks=ranks, ranks_per_node=ranks)
    return Robust()(earlier, topology)


if __name__ == "__main__":
    main()
