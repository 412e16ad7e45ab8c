"""The front end of a live service: it deals requests to the members, and asks again what a member took to its grave.

A request has an id, and its first answer counts: asked twice, it is answered once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import numpy as np

from moe import Coordinator, Server
from moe.comm import ask
from placement import Placement, Plan
from scripts.serving.member import Entered, Left, Part, Stepped, take_part
from scripts.serving.requests import Request

CONTEXT = multiprocessing.get_context("forkserver")  # what members import is imported once
CONTEXT.set_forkserver_preload(["scripts.serving.member"])


@dataclass
class Desk:
    """Who has which request. A value of a process, without any other.

    asked: by member, what it has not answered. again: requests that were asked a second time. doubled: answers that
    came for one that had its answer.
    """

    waiting: deque[Request]
    depth: int
    asked: dict[int, dict[int, Request]] = field(default_factory=dict)
    answers: dict[int, bytes] = field(default_factory=dict)
    again: list[int] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)

    def enter(self, member: int) -> None:
        self.asked.setdefault(member, {})

    def leave(self, member: int) -> None:
        """What it had not answered is asked next, the oldest first."""
        left = self.asked.pop(member, {})
        self.again += left
        self.waiting.extendleft(reversed(left.values()))

    def hear(self, member: int, number: int, text: bytes) -> None:
        self.asked.get(member, {}).pop(number, None)
        if number in self.answers:
            self.doubled.append(number)
        else:
            self.answers[number] = text

    def deal(self) -> list[tuple[int, Request]]:
        """-> who is to be asked what now: up to `depth` requests each, who has fewest first."""
        dealt: list[tuple[int, Request]] = []
        while self.waiting and self.asked:
            member = min(self.asked, key=lambda m: (len(self.asked[m]), m))
            if len(self.asked[member]) >= self.depth:
                break
            request = self.waiting.popleft()
            self.asked[member][request.id] = request
            dealt.append((member, request))
        return dealt


class Front:
    """members: those that serve, as they last said. steps: all that anybody said of its steps."""

    def __init__(self, part: Part, founders: int, experts: int, layers: int) -> None:
        self.server = Server(Coordinator(lease=20.0, report=60.0))
        self.server.start()
        self.part = replace(part, address=self.server.address)
        self.desk = Desk(deque(), depth=2 * part.schedule.slots)
        self.steps: list[Stepped] = []
        self.pids: dict[int, int] = {}
        self._processes: list[BaseProcess] = []
        self._member_of: dict[Connection, int] = {}
        self._pipe_of: dict[int, Connection] = {}
        self.start(founders, even(experts, founders, layers))

    def start(self, count: int, plan: Plan | None = None) -> None:
        for _ in range(count):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=take_part, args=(replace(self.part, plan=plan), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._member_of[ours] = -1

    def status(self) -> dict[str, Any]:
        return ask(self.server.address, "status", timeout=60.0)

    @property
    def known(self) -> int:
        """Members that have said something."""
        return len(self._pipe_of)

    def scale(self, count: int) -> None:
        ask(self.server.address, "scale", timeout=60.0, op=f"{count} at {time.monotonic()}", count=count)

    def kill(self, member: int) -> None:
        os.kill(self.pids[member], signal.SIGKILL)

    def rests_at(self, count: int) -> bool:
        """So many serve, and nothing is under way."""
        status = self.status()
        return status["phase"] == "IDLE" and len(status["members"]) == count

    def pump(self, seconds: float = 0.02) -> None:
        """Hear what came, and ask what can be asked."""
        for pipe in wait(list(self._member_of), seconds):
            assert isinstance(pipe, Connection)
            try:
                while pipe.poll():
                    self._hear(pipe, pipe.recv())
            except (EOFError, OSError):
                self._lose(pipe)
        for member, request in self.desk.deal():
            with contextlib.suppress(OSError):  # it died: that is heard as the end of its pipe, and it is asked again
                self._pipe_of[member].send(request)

    def _hear(self, pipe: Connection, message: Entered | Stepped | Left) -> None:
        self._member_of[pipe] = message.member
        self._pipe_of[message.member] = pipe
        if isinstance(message, Entered):
            self.pids[message.member] = message.pid
            self.desk.enter(message.member)
        elif isinstance(message, Left):
            self.desk.leave(message.member)
        else:
            self.steps.append(message)
            for number, text in message.said:
                self.desk.hear(message.member, number, text)

    def _lose(self, pipe: Connection) -> None:
        self.desk.leave(self._member_of.pop(pipe))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._member_of:
            pipe.close()
        self.server.stop()


def even(experts: int, ranks: int, layers: int) -> Plan:
    """In order of their numbers; the first ranks have one more where it does not divide."""
    dealt = np.array_split(np.arange(experts), ranks)
    rows = [np.pad(ids, (0, len(dealt[0]) - len(ids)), constant_values=-1) for ids in dealt]
    return Plan(placement_L=(Placement(expert_RS=np.stack(rows)),) * layers)
