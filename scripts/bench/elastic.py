"""What it costs a live model to be resized, and to lose a member. Ratios; processes on this machine, over gloo.

    python -m scripts.bench.elastic

A control is the same service in the same run, just before: both see the same machine. Steps of a service whose
processes share few cores vary by themselves; so the share of long steps is given for the control too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from moe import MoE, MoEConfig
from moe.comm import Pace, Peers, Server, ask
from moe.coordinator import Coordinator
from moe.live import Live
from moe.terms import Terms
from placement import Placement, Plan, Topology, fewest_moves
from scripts.bench.table import finish, parser, show

CONFIG = MoEConfig(dim=256, hidden=512, num_experts=64, top_k=2)
LAYERS, TOKENS = 2, 64
EXPERT_BYTES = 4 * 3 * CONFIG.dim * CONFIG.hidden
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["moe.live"])
CONTROL_SECONDS = 4.0


@dataclass
class Seen:
    """By one member. steps: (when it began, seconds, whether experts travelled). peak: the most experts of a layer it
    held; recoveries: (noticed, resolved, ready, the step done again)."""

    member: int
    bytes: int
    peak: int
    steps: list[tuple[float, float, bool]]
    recoveries: list[tuple[float, ...]]


def coordinate(pipe: Connection) -> None:
    server = Server(Coordinator(lease=10.0))
    pipe.send(server.address)
    server.serve()


def work(address: str, plan: Plan | None, pace: Pace, pipe: Connection) -> None:
    torch.set_num_threads(1)
    config = CONFIG

    def build(group: Peers, plan: Plan) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleList([MoE(config, group, placement) for placement in plan.placement_L])

    def read(layer: str, expert: int) -> dict[str, torch.Tensor]:
        shapes = live.stock.layers[int(layer)].experts.named_parameters()
        return {name: torch.zeros(weight.shape[1:]) for name, weight in shapes}

    terms = Terms(timeout=20.0, pace=pace, read=read)
    live = Live.join(address, build, terms) if plan is None else Live.found(address, plan, build, terms)
    pipe.send((live.member, os.getpid()))
    layers = live.stock.layers
    seen = Seen(live.member, 0, 0, [], [])
    x = torch.randn(TOKENS, CONFIG.dim, generator=torch.Generator().manual_seed(live.member))
    with torch.inference_mode():
        while live.serves():
            began, tries = time.monotonic(), live.retries
            live.run(lambda: [layer(x) for layer in layers])
            ended, task = time.monotonic(), live._staging
            if live.retries > tries:
                seen.recoveries.append((*live.recoveries[-1], ended))
            arrived = () if task is None else tuple(task.arrived)
            held = [len(layer.experts.expert_ids) + sum(n == k for n, _ in arrived) for k, layer in enumerate(layers)]
            seen.peak = max(seen.peak, *held)
            seen.steps.append((began, ended - began, task is not None and not task.ready))
    seen.bytes = live.bytes
    live.close()
    pipe.send(seen)


class Service:
    """The coordinator and the members, all of them processes of this machine."""

    def __init__(self, founders: int, pace: Pace) -> None:
        self.pace = pace
        ours, theirs = CONTEXT.Pipe()
        self.processes = [CONTEXT.Process(target=coordinate, args=(theirs,), daemon=True)]
        self.processes[0].start()
        self.address: str = ours.recv()
        self.pipes: dict[int, Connection] = {}
        self.pids: dict[int, int] = {}
        self.plan = even(founders)
        self.start(founders, self.plan)

    def start(self, count: int, plan: Plan | None = None) -> None:
        pipes = []
        for _ in range(count):
            ours, theirs = CONTEXT.Pipe()
            self.processes.append(
                CONTEXT.Process(target=work, args=(self.address, plan, self.pace, theirs), daemon=True)
            )
            self.processes[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            member, pid = pipe.recv()
            self.pipes[member], self.pids[member] = pipe, pid

    def scale(self, count: int) -> None:
        ask(self.address, "scale", op=f"to-{count}-{time.monotonic()}", count=count)
        self.until(lambda status: status["phase"] == "IDLE" and len(status["members"]) == count)

    def until(self, done: Callable[[dict[str, Any]], bool]) -> None:
        while not done(ask(self.address, "status")):
            time.sleep(0.05)

    def end(self, lost: Sequence[int] = ()) -> list[Seen]:
        self.scale(0)
        return [pipe.recv() for member, pipe in self.pipes.items() if member not in lost]


@contextmanager
def service(founders: int, pace: Pace = Pace()) -> Iterator[Service]:
    made = Service(founders, pace)
    try:
        yield made
    finally:
        for process in made.processes:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()


def even(ranks: int) -> Plan:
    dealt = np.array_split(np.arange(CONFIG.num_experts), ranks)
    width = len(dealt[0])
    rows = np.stack([np.pad(ids, (0, width - len(ids)), constant_values=-1) for ids in dealt])
    return Plan(placement_L=(Placement(expert_RS=rows),) * LAYERS)


def resized(before: int, after: int, pace: Pace) -> list[object]:
    """One change of size, and its ratios."""
    with service(before, pace) as made:
        made.start(max(after - before, 0))
        time.sleep(CONTROL_SECONDS)
        began = time.monotonic()
        made.scale(after)
        seen = made.end()
    steps = [step for each in seen for step in each.steps]
    control = [seconds for when, seconds, _ in steps if began - CONTROL_SECONDS < when < began]
    during = [seconds for when, seconds, copying in steps if copying and when >= began]
    least = LAYERS * lower_bound(made.plan.placement_L[0], after)
    most = max(-(-CONFIG.num_experts // before), -(-CONFIG.num_experts // after))
    twice = -(-CONFIG.num_experts // before) + -(-CONFIG.num_experts // after)
    typical = statistics.median(control)
    return [
        f"{before} -> {after}",
        f"{least * EXPERT_BYTES / 1e6:.0f}",
        sum(each.bytes for each in seen) / (least * EXPERT_BYTES),
        statistics.median(during) / typical,
        max(during) / max(control),
        f"{share(during, typical):.1f} / {share(control, typical):.1f}",
        max(each.peak for each in seen) / most,
        max(each.peak for each in seen) / twice,
    ]


def share(steps: Sequence[float], typical: float) -> float:
    """Percent of steps longer than twice the typical one."""
    return 100 * sum(seconds > 2 * typical for seconds in steps) / len(steps)


def lower_bound(running: Placement, ranks: int) -> int:
    """E - sum over ranks of min(held, to hold)."""
    slots = Topology.even(ranks=ranks, slots=CONFIG.num_experts, ranks_per_node=ranks)
    counts = sorted(fewest_moves(running, slots).held_RE.sum(axis=1).tolist(), reverse=True)
    held = sorted(running.held_RE.sum(axis=1).tolist(), reverse=True)[:ranks]
    return int(CONFIG.num_experts - sum(min(pair) for pair in zip(held, counts)))


def bereaved(members: int) -> list[object]:
    """A member is killed; milliseconds until the last survivor is through with each part, median step for scale."""
    with service(members) as made:
        time.sleep(CONTROL_SECONDS)
        victim = members
        died = time.monotonic()
        os.kill(made.pids[victim], signal.SIGKILL)
        made.until(lambda status: status["phase"] == "IDLE" and len(status["members"]) == members - 1)
        seen = made.end(lost=[victim])
    noticed, resolved, ready, done = (max(times) for times in zip(*(each.recoveries[0] for each in seen)))
    typical = statistics.median(seconds for each in seen for when, seconds, _ in each.steps if when < died)
    parts = [noticed - died, resolved - noticed, ready - resolved, done - ready, done - died]
    return [members, f"{1e3 * typical:.0f}", *(f"{1e3 * part:.0f}" for part in parts)]


def main() -> None:
    given = parser(__doc__).parse_args()
    heads = [
        "members", "MB to move", "moved / least", "median step / control", "worst step / control's",
        "long steps %, copying / control", "peak experts / max(before, after)", "peak / (before + after)",
    ]  # fmt: skip
    pace = Pace(bytes_per_second=1e8)
    rows = [resized(before, after, pace) for before, after in ((2, 3), (4, 3), (2, 4), (4, 2))]
    show("a live model is resized", heads, rows)
    heads = ["members", "a step", "noticed", "told how to go on", "new group, experts restored", "step again", "in all"]
    show("a member is killed (ms)", heads, [bereaved(members) for members in (3, 4)])
    finish(given)


if __name__ == "__main__":
    main()
