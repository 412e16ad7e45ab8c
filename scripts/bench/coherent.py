"""Claim: tokens that stay with their experts cross ranks less often, in fewer messages; and what the context costs.

    python -m scripts.bench.coherent -o out/coherent       # trains two small models first, some minutes each

16 experts on four gloo processes of one machine, top-1 and top-2. Plans come from moe-place and a trace of the first
windows of each held-out package; requests are of the rest. Only steps in which every sequence reads one byte are
counted and timed, with every slot taken: the prompts are read before. Ratios are to the ordinary path under the same
plan, in turn with it; "again" is that path a second time.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moe import MoE, World
from moe.coherent import Traffic
from moe.comm import Peers, max_over, world_group
from placement import LoadTrace, Placement, Plan
from placement.metrics import local_share
from routing import Assignment, Choice
from scripts.bench.table import median_ratio, rounds, show
from scripts.model import Bytes
from scripts.serving.batch import Continuous
from scripts.serving.coherent import Coherent
from scripts.serving.engine import Engine, Ordinary, share_of
from scripts.serving.requests import Poisson, Request, stream
from scripts.serving.weights import load_model
from scripts.text import by_package
from scripts.trace import record
from scripts.train import Run, Trainer, small, train

EXPERTS, LAYERS, WINDOWS = 16, 4, 4
SLOTS, PROMPT, ANSWER = 8, 16, 33
PLANNED = {
    "affinity": ("--planner", "affinity"),
    "joint": ("--planner", "affinity", "--balance-cap", "1.1", "--fan-out", "1"),
}
HEADS = [
    "top-k", "plan", "hops that stay, by the plan", "all-to-alls a layer", "rows between ranks ÷ ordinary",
    "bytes of tokens ÷ ordinary", "bytes with the context ÷ ordinary", "time ÷ ordinary", "(again)",
]  # fmt: skip


class Seen(NamedTuple):
    """Of all ranks together. seconds: of the slowest."""

    steps: int
    tokens: Traffic
    context: Traffic
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600, help="of the training")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows: list[list[object]] = []
    for top_k in (1, 2):
        folder = arguments.output / f"top{top_k}"
        shape = replace(small("loss-free", experts=EXPERTS, top_k=top_k), layers=LAYERS)
        if not (folder / "result.json").exists():
            train(Trainer(Run(shape=shape, steps=arguments.steps), None), folder)
        trace = record(load_model(folder), WINDOWS)
        trace.save(folder / "trace.npz")
        with World(arguments.ranks) as world:
            for name, path in plans(folder, arguments.ranks).items():
                rows.append([top_k, name, *compared(world, folder, path, trace, arguments.rounds)])
    show(f"Tokens that stay with their experts, {EXPERTS} experts on {arguments.ranks} ranks", HEADS, rows)


def plans(folder: Path, ranks: int) -> dict[str, Path]:
    """Contiguous, and those that moe-place makes from the trace."""
    paths = {name: folder / f"{name}-{ranks}.json" for name in ("contiguous", *PLANNED)}
    contiguous = Placement(expert_RS=np.arange(EXPERTS).reshape(ranks, -1))
    Plan(placement_L=(contiguous,) * LAYERS).save(paths["contiguous"])
    tool = Path(sys.executable).with_name("moe-place")
    machine = ("--nodes", "1", "--ranks-per-node", str(ranks), "--slots", str(EXPERTS // ranks))
    for name, options in PLANNED.items():
        command = [str(tool), "plan", str(folder / "trace.npz"), *machine, *options, "-o", str(paths[name])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return paths


def compared(world: World, folder: Path, plan: Path, trace: LoadTrace, count: int) -> list[object]:
    seen: dict[str, Seen] = {}

    def timed(name: str) -> float:
        seen[name] = world.run(decode, folder, plan, name == "coherent")[0]
        return seen[name].seconds / seen[name].steps

    candidates: dict[str, Callable[[], float]] = {
        name: partial(timed, name) for name in ("ordinary", "coherent", "ordinary again")
    }
    seconds = rounds(candidates, count)
    usual, coherent = seen["ordinary"], seen["coherent"]
    pair_LEE = trace.follow_LEE
    assert pair_LEE is not None
    print(f"ordinary, {plan.stem}: {statistics.median(seconds['ordinary']) * 1e3:.1f} ms a step", flush=True)
    return [
        local_share(Plan.load(plan), pair_LEE, range(world.ranks)),
        coherent.tokens.exchanges / (coherent.steps * LAYERS),
        coherent.tokens.rows / usual.tokens.rows,
        coherent.tokens.bytes / usual.tokens.bytes,
        (coherent.tokens.bytes + coherent.context.bytes) / usual.tokens.bytes,
        median_ratio(seconds["coherent"], seconds["ordinary"]),
        median_ratio(seconds["ordinary again"], seconds["ordinary"]),
    ]


def decode(folder: Path, plan: Path, coherent: bool) -> Seen:
    """On every rank: its prompts in one step, then byte by byte until all are answered, which is at once."""
    peers = Peers.of(world_group())
    model, heard = listened(folder, plan)
    schedule = Continuous(slots=SLOTS, tokens=SLOTS * PROMPT)
    path = Coherent(model, schedule, peers) if coherent else Ordinary(model, schedule)
    engine = Engine(path, schedule, model.shape.length)
    engine.submit(share_of(requests(SLOTS * peers.size), peers))
    engine.commit(engine.propose(), 0.0)
    heard.clear()
    if isinstance(path, Coherent):
        path.traffic = path.context = Traffic(0, 0, 0)
    start, steps = time.perf_counter(), 0
    while not engine.idle:
        engine.commit(engine.propose(), 0.0)
        steps += 1
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    max_over([seconds], peers)
    usual, none = Traffic(2 * len(heard), sum(heard), sum(heard) * model.shape.moe.dim * 4), Traffic(0, 0, 0)
    if isinstance(path, Coherent):
        return Seen(steps, path.traffic, path.context, seconds.item())
    return Seen(steps, usual, none, seconds.item())


@functools.cache
def listened(folder: Path, plan: Path) -> tuple[Bytes, list[int]]:
    """A model, and the rows that go to other ranks and come home, a number for each layer and step."""
    model, heard = load_model(folder, world_group(), Plan.load(plan)), []

    def hear(choice: Choice, assignment: Assignment) -> None:
        flow_RRE = assignment.flow_RRE()
        heard.append(2 * int(flow_RRE.sum() - np.einsum("rre->", flow_RRE)))

    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.observe(hear)
    return model, heard


@functools.cache
def requests(count: int) -> tuple[Request, ...]:
    """Of what the trace has not seen."""
    texts = {name: text[WINDOWS * 1024 :] for name, text in by_package().items()}
    return stream(texts, count, Poisson(rate=1.0), prompt=(PROMPT, PROMPT), new_tokens=(ANSWER, ANSWER))


if __name__ == "__main__":
    main()
