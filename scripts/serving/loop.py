"""The loop around an engine: requests arrive, all ranks step together, and agree when there is nothing left to do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.comm import Peers, gather_counts
from scripts.serving.engine import Answer, Engine
from scripts.serving.requests import Request


class Clock(Protocol):
    @property
    def now(self) -> float: ...

    def tick(self) -> None:
        """A step was taken."""

    def rest(self) -> None:
        """Nobody has anything to do yet."""


@dataclass(kw_only=True)
class Steps:
    """A clock that counts steps: the same run again is the same to the byte, latencies included."""

    now: float = 0.0

    def tick(self) -> None:
        self.now += 1.0

    def rest(self) -> None:
        self.now += 1.0


class Seconds:
    """The clock on the wall, from its making on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._start

    def tick(self) -> None:
        """Time passes by itself."""

    def rest(self) -> None:
        time.sleep(1e-3)


def nothing(step: int) -> None:
    """Between two steps."""


def serve(
    engine: Engine,
    requests: Iterable[Request],
    clock: Clock,
    peers: Peers,
    *,
    deliver: Callable[[Answer], object],
    between: Callable[[int], object] = nothing,
) -> int:
    """Until every rank's requests are answered. -> steps

    requests: this rank's, by arrival. deliver: called with each answer as it is complete. between: called after each
    step on every rank alike, with the number of steps so far: here experts may move.
    """
    coming, steps = deque(requests), 0
    while True:
        while coming and coming[0].arrival <= clock.now:
            engine.submit([coming.popleft()])
        busy_R, coming_R = gather_counts(torch.tensor([not engine.idle, len(coming)]).long(), peers).T
        if busy_R.any():
            proposal = engine.propose()
            clock.tick()
            for answer in engine.commit(proposal, clock.now):
                deliver(answer)
            steps += 1
            between(steps)
        elif coming_R.any():
            clock.rest()
        else:
            return steps
