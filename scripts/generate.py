"""Serve a stream of requests with a model that scripts.train trained, its experts spread over all ranks.

    torchrun --standalone --nproc-per-node 4 -m scripts.generate --from out/bip -o out/served --requests 200
    ... --arrivals bursty --rate 0.4 --clock steps                  # the same to the byte whenever it runs
    ... --plan plan.json --replan-every 100                         # made by moe-place; made anew while it runs

Each rank serves its share of the requests; all of them run every step together, idle or not. Writes to the folder: a
line for each request, by rank; one for each step; result.json. Greedy answers are those of one process, wherever the
experts live, except where two bytes, or two experts, are equal but for rounding: a matmul of few rows may round another
way than one of many. With --dtype float64 that does not happen in practice.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe import Elastic
from moe.comm import EVERYONE, Peers, gather_objects, world_group
from placement import Advice, ExpertShape, GemmCurve, Plan, Robust, Topology, advise
from routing import Assigner, AtHome, LeastLoaded
from scripts.model import Bytes
from scripts.serving.batch import Continuous
from scripts.serving.coherent import Coherent
from scripts.serving.engine import Answer, Engine, Ordinary, require_room, share_of
from scripts.serving.loads import Loads
from scripts.serving.loop import Seconds, Steps, serve
from scripts.serving.report import line_of, summary
from scripts.serving.requests import Arrivals, Bursty, Drift, Poisson, Request, stream
from scripts.serving.weights import load_model
from scripts.text import by_package

ARRIVALS: dict[str, Callable[..., Arrivals]] = {"poisson": Poisson, "bursty": Bursty}
CLOCKS: dict[str, Callable[[], Steps | Seconds]] = {"steps": Steps, "seconds": Seconds}


@dataclass(frozen=True, kw_only=True)
class Served:
    """How a stream is served. plan: None for round robin. replan_every: steps, 0 for never. coherent: tokens stay with
    their experts. judge: says whether a new plan is worth its moves."""

    schedule: Continuous = Continuous()
    clock: str = "seconds"
    plan: Plan | None = None
    replan_every: int = 0
    judge: Callable[..., Advice] = advise
    coherent: bool = False
    assigner: Assigner = AtHome()
    dtype: torch.dtype = torch.float32


def generate(source: Path, requests: tuple[Request, ...], served: Served, folder: Path) -> dict[str, Any]:
    """On every rank alike. -> what came out, also in result.json"""
    group = world_group()
    peers = Peers.of(group)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(source, group, served.plan, assigner=served.assigner, dtype=served.dtype)
    for request in requests:  # on every rank alike, before any waits for another
        require_room(request, model.shape.length)
    path = Coherent(model, served.schedule, peers) if served.coherent else Ordinary(model, served.schedule)
    engine = Engine(path, served.schedule, model.shape.length)
    lines: list[dict[str, Any]] = []
    with (folder / f"rank{peers.rank}.jsonl").open("w") as log:

        def deliver(answer: Answer) -> None:
            lines.append(line_of(answer, peers.rank))
            log.write(json.dumps(lines[-1]) + "\n")
            log.flush()

        between = Between(model, served, folder / "steps.jsonl" if peers.rank == 0 else None)
        clock, start = CLOCKS[served.clock](), time.perf_counter()
        steps = serve(engine, share_of(requests, peers), clock, peers, deliver=deliver, between=between)
        seconds = time.perf_counter() - start
    everything = [line for each in gather_objects(lines, peers) for line in each]
    result = summary(everything, expected=len(requests), steps=steps, seconds=seconds)
    result |= {"clock": served.clock, "ranks": peers.size, "peak": between.peak, "moves": between.moves}
    if isinstance(path, Coherent):
        result |= {"traffic": path.traffic._asdict(), "context": path.context._asdict()}
    if peers.rank == 0:
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


class Between:
    """Between two steps: what the experts had to do is heard, written down, and where it pays they move.

    lines: one for each step so far. load_R: rows each rank computed, over all layers.
    """

    def __init__(self, model: Bytes, served: Served, log: Path | None) -> None:
        self.loads, self.log, self.moves = Loads(model), log, 0
        self.lines: list[dict[str, Any]] = []
        self.elastic = _elastic(model, served) if served.replan_every else None
        if log is not None:
            log.write_text("")

    def __call__(self, step: int) -> None:
        peak, rows = self.loads.peak, int(self.loads.load_LE.sum())
        load_R = self.loads.load_LR.sum(axis=0).tolist()
        self.loads.settle()
        moved = None if self.elastic is None else self.elastic.step()
        moves = 0 if moved is None else moved.moves
        self.moves += moves
        self.lines.append({"step": step, "rows": rows, "peak": peak, "moves": moves, "load_R": load_R})
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")

    @property
    def peak(self) -> float:
        """The mean over the steps."""
        return sum(line["peak"] for line in self.lines) / max(len(self.lines), 1)


def _elastic(model: Bytes, served: Served) -> Elastic:
    config, peers = model.shape.moe, Peers.of(EVERYONE)
    shape = ExpertShape(dim=config.dim, hidden=config.hidden, value_bytes=served.dtype.itemsize)
    topology = None if served.plan is None else served.plan.topology
    if topology is None:
        topology = Topology.fitting(num_experts=config.num_experts, ranks=peers.size, ranks_per_node=peers.size)
    judge = partial(
        served.judge, curve=GemmCurve.modelled(shape, flops=5e9), shape=shape, steps=10 * served.replan_every
    )
    return Elastic(model, None, topology, plan_every=served.replan_every, planner=Robust(), advise=judge, patience=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the folder of a run of scripts.train")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--arrivals", choices=ARRIVALS, default="poisson")
    parser.add_argument("--rate", type=float, default=20.0, help="requests in a unit of the clock, over all ranks")
    parser.add_argument("--clock", choices=CLOCKS, default="seconds", help="what arrivals and latencies count in")
    parser.add_argument("--drift", type=int, default=50, help="requests until another topic is hot")
    parser.add_argument("--prompt", type=int, nargs=2, default=(8, 48), help="fewest and most bytes")
    parser.add_argument("--new-tokens", type=int, nargs=2, default=(8, 32), help="fewest and most bytes")
    parser.add_argument("--slots", type=int, default=8, help="requests at a time, on each rank")
    parser.add_argument("--tokens", type=int, default=64, help="bytes a step reads at most, on each rank")
    parser.add_argument("--plan", type=Path, help="of moe-place, for as many ranks")
    parser.add_argument("--replan-every", type=int, default=0, help="steps; experts move where it pays")
    parser.add_argument("--reroute", action="store_true", help="least-loaded rerouting between ranks")
    parser.add_argument("--coherent", action="store_true", help="tokens stay with their experts (moe.coherent)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the stream")
    arguments = parser.parse_args()
    if arguments.coherent and arguments.reroute:
        parser.error("--coherent takes a token to its experts and --reroute experts to tokens; choose one")
    requests = stream(
        by_package(),
        arguments.requests,
        ARRIVALS[arguments.arrivals](rate=arguments.rate),
        Drift(period=arguments.drift),
        prompt=tuple(arguments.prompt),
        new_tokens=tuple(arguments.new_tokens),
        seed=arguments.seed,
    )
    served = Served(
        schedule=Continuous(slots=arguments.slots, tokens=arguments.tokens),
        clock=arguments.clock,
        plan=None if arguments.plan is None else Plan.load(arguments.plan),
        replan_every=arguments.replan_every,
        coherent=arguments.coherent,
        assigner=LeastLoaded() if arguments.reroute else AtHome(),
        dtype=getattr(torch, arguments.dtype),
    )
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" in os.environ:
        dist.init_process_group()
    try:
        result = generate(arguments.source, requests, served, arguments.output)
        if Peers.of(EVERYONE).rank == 0:
            print(json.dumps(result, indent=1))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
