"""A member of a live service: it answers requests that come down a pipe, together with whoever else is there.

What it sends up, in order: `Entered` when it serves in another epoch; `Stepped` after each step, with the answers that
the step completed; `Left` when it serves no more, and what it had not answered is to be asked of others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe import Live, MoE, Terms
from moe.comm import Peers, read_tensors, stored_tensors
from moe.outside import ReleasedError
from placement import Plan
from routing import Assignment, Choice
from scripts.model import Bytes
from scripts.serving.batch import Continuous
from scripts.serving.engine import Engine, Ordinary, Proposal
from scripts.serving.weights import load_model
from scripts.train import MODEL


@dataclass(frozen=True, kw_only=True)
class Part:
    """How a member takes part. plan: of a founder, None for who joins later."""

    address: str
    source: Path
    schedule: Continuous
    plan: Plan | None = None
    dtype: torch.dtype = torch.float64


class Entered(NamedTuple):
    member: int
    pid: int
    epoch: int
    members: tuple[int, ...]


class Stepped(NamedTuple):
    """began: of a clock that all processes of this machine share. rows: of this rank's experts. tries: 1, and one more
    for each time it broke."""

    member: int
    epoch: int
    began: float
    seconds: float
    rows: int
    tries: int
    said: tuple[tuple[int, bytes], ...]


class Left(NamedTuple):
    member: int


def take_part(part: Part, pipe: Connection) -> None:
    """The whole life of a member."""
    torch.set_num_threads(1)

    def build(peers: Peers, plan: Plan) -> nn.Module:
        return load_model(part.source, peers, plan, dtype=part.dtype)

    terms = Terms(timeout=20.0, read=reader(part.source / MODEL, part.dtype))
    if part.plan is None:
        live = Live.join(part.address, build, terms)
    else:
        live = Live.found(part.address, part.plan, build, terms)
    with torch.inference_mode():
        serve(live, part.schedule, pipe)
    live.close()
    pipe.close()


def serve(live: Live, schedule: Continuous, pipe: Connection) -> None:
    model = live.model
    assert isinstance(model, Bytes)
    engine = Engine(Ordinary(model, schedule), schedule, model.shape.length)
    rows, epoch = Rows(live), -1
    if live.epoch is None:
        pipe.send(Left(live.member))
    while live.serves():
        if live.epoch is not None and live.epoch.number != epoch:
            epoch = live.epoch.number
            pipe.send(Entered(live.member, os.getpid(), epoch, tuple(live.epoch.members)))
        while pipe.poll(0.0 if engine.running else 0.005):
            engine.submit([pipe.recv()])
        began, before = time.monotonic(), live.retries
        try:
            proposal = live.run(rows.counted(engine.propose))
        except ReleasedError:
            break
        said = tuple((answer.request.id, answer.text) for answer in engine.commit(proposal, time.monotonic()))
        seconds, tries = time.monotonic() - began, 1 + live.retries - before
        pipe.send(Stepped(live.member, epoch, began, seconds, rows.count, tries, said))
        if live.epoch is None:
            engine.release()
            pipe.send(Left(live.member))


class Rows:
    """count: rows that this rank's experts computed in the last try of a step."""

    def __init__(self, live: Live) -> None:
        self.live, self.count = live, 0
        for layer in live.model.modules():
            if isinstance(layer, MoE):
                layer.observe(self._hear)

    def counted(self, propose: Callable[[], Proposal]) -> Callable[[], Proposal]:
        def step() -> Proposal:
            self.count = 0
            return propose()

        return step

    def _hear(self, choice: Choice, assignment: Assignment) -> None:
        self.count += int(assignment.load_R[self.live.peers.rank])


def reader(folder: Path, dtype: torch.dtype) -> Callable[[str, int], Mapping[str, Tensor]]:
    """-> (layer's name, expert) to its tensors, from a checkpoint of moe.checkpoint, which has them by expert."""

    def read(layer: str, expert: int) -> Mapping[str, Tensor]:
        stored, prefix = stored_tensors(folder), f"model.{layer}.experts.{expert}."
        tensors = {
            name: torch.empty(info.shape, dtype=info.dtype) for name, info in stored.items() if name.startswith(prefix)
        }
        read_tensors(tensors, folder)
        return {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in tensors.items()}

    return read
