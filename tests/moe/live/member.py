"""What a member does in tests: serve numbered requests, check every answer to the bit, and fail where it is told to."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe import Loop, MoE, MoEConfig, ReLU2
from moe.backup import nobody, other_host
from moe.comm import Pace, Peers, sum_over
from moe.course import Phase
from moe.live import Live
from moe.outside import Build
from moe.terms import Terms
from placement import Placement, Plan

LAYERS, DIM, HIDDEN, TOKENS = 2, 8, 16, 12


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At a phase, in one member, once: a signal to itself, or to another process."""

    member: int
    phase: Phase
    signal: int = signal.SIGKILL
    victim: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """How a member takes part. plan: of a founder. watch: a process a few steps after whose
    end all members end; 0 for none. lives:
    how often it joins, each time as somebody new."""

    address: str
    experts: int
    plan: Plan | None = None
    fault: Fault | None = None
    timeout: float = 20.0
    reads: bool = False
    backup: bool = False
    network: str = ""
    watch: int = 0
    lives: int = 1
    pause: float = 0.0
    slots: int = 0
    pace: Pace = Pace()
    log: str = ""


@dataclass
class Told:
    """What a member says when it ends."""

    pid: int
    member: int
    served: list[int] = field(default_factory=list)
    wrong: int = 0
    left: int = 10
    retries: int = 0
    error: str = ""
    held: Any = None
    epochs: list[int] = field(default_factory=list)
    resources: list[tuple[int, int, int]] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    salvaged: int = 0


class Net(nn.Module):
    """Two layers whose numbers are small and whole, so that sums are exact in any order."""

    def __init__(self, experts: int, group: Any, placements: tuple[Placement, ...] | None, seed: int = 0) -> None:
        super().__init__()
        config = MoEConfig(dim=DIM, hidden=HIDDEN, num_experts=experts, top_k=2, activation=ReLU2(), compute=Loop())
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            MoE(config, group, None if placements is None else placements[layer]) for layer in range(LAYERS)
        )
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, MoE)
            for slot, expert in enumerate(layer.experts.expert_ids):
                for name, weight in layer.experts.named_parameters():
                    weight.data[slot] = whole_numbers(number, expert, name, weight.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:  # halves of halves: what the first layer says stays exact in the second
            x = (layer(x) * 2**-6).round() * 2**-2
        return x


def whole_numbers(layer: int, expert: int, name: str, shape: torch.Size) -> Tensor:
    seed = 1000 * layer + 10 * expert + (name == "up")
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def even(experts: int, ranks: int) -> Plan:
    rows = [[e for e in range(experts) if e * ranks // experts == rank] for rank in range(ranks)]
    width = max(map(len, rows))
    table = np.array([row + [-1] * (width - len(row)) for row in rows])
    return Plan(placement_L=(Placement(expert_RS=table),) * LAYERS)


def request(member: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(100_000 * member + number)
    return torch.randint(-3, 4, (TOKENS, DIM), generator=generator).float()


def resources() -> tuple[int, int, int]:
    """File descriptors, threads and resident kilobytes of this process."""
    status = Path("/proc/self/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0])
    descriptors, threads = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("fd", "task"))
    return descriptors, threads, resident


def serve(part: Part, pipe: Connection) -> None:
    """The whole life of a member. Tells its number and pid first, what it saw last."""
    torch.set_num_threads(1)
    enter(part.network)
    told, counts = Told(os.getpid(), 0), Counter[Phase]()

    def at(phase: Phase) -> None:
        counts[phase] += 1
        fault = part.fault
        if fault is not None and (fault.member, fault.phase, 1) == (told.member, phase, counts[phase]):
            os.kill(fault.victim or os.getpid(), fault.signal)

    def build(group: Peers, plan: Plan) -> Net:
        return Net(part.experts, group, plan.placement_L, seed=0 if part.plan is not None else 99)

    def read(layer: str, expert: int) -> dict[str, Tensor]:
        number, net = int(layer.rpartition(".")[2]), whole
        weights = net.layers[number].experts.named_parameters()  # type: ignore[union-attr]
        return {name: weight.data[expert] for name, weight in weights}

    whole = Net(part.experts, None, None)
    terms = Terms(
        timeout=part.timeout, patience=60.0, beat=0.2, slots=part.slots, pace=part.pace, at=at,
        backup=other_host if part.backup else nobody,
        read=read if part.reads else None,
    )  # fmt: skip
    with torch.inference_mode():
        try:
            for _ in range(part.lives):
                plan = part.plan
                live = (
                    Live.join(part.address, build, terms)
                    if plan is None
                    else Live.found(part.address, plan, build, terms)
                )
                told.member = live.member
                pipe.send((told.member, told.pid))
                while told.left and live.serves():
                    _step(live, whole, told, part)
                told.retries, told.held = live.retries, live.stock.held_L
                live.close()
        except Exception as error:
            told.error = f"{type(error).__name__}: {error}"
    pipe.send(told)
    pipe.close()


def _live(part: Part, build: Build, terms: Terms) -> Live:
    if part.plan is None:
        return Live.join(part.address, build, terms)
    return Live.found(part.address, part.plan, build, terms)


def _step(live: Live, whole: Net, told: Told, part: Part) -> None:
    number = len(told.served)
    x = request(live.member, number)
    gone = torch.zeros(1)

    def step() -> Tensor:
        y: Tensor = live.model(x)
        if part.watch:  # all who serve end after the same step
            gone.fill_(not is_alive(part.watch))
            sum_over([gone], live.peers)
        return y

    y = live.run(step)
    told.wrong += not torch.equal(y, whole(x))
    told.served.append(number)
    if part.watch and gone == live.peers.size:
        told.left -= 1
    if live.epoch is not None and live.epoch.number not in told.epochs[-1:]:
        told.epochs.append(live.epoch.number)
        told.resources.append(resources())
    told.salvaged = len(live._salvage.rows)
    told.most.append(max(len(held) for held in live.stock.held_L))
    if part.log:
        with Path(part.log).open("a") as file:
            file.write(f"{live.member} {number}\n")
    if part.pause:
        time.sleep(part.pause)


def enter(network: str) -> None:
    """The network namespace of that name, if any."""
    if network:
        with Path(f"/run/netns/{network}").open() as file:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.setns(file.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
