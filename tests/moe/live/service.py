"""A service for tests: a coordinator in its own process, members in theirs, all of them killed at the end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from moe.comm import Server, ask, kill, spare
from moe.coordinator import Coordinator
from tests.moe.live.member import Part, Told, even, is_alive, serve

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.moe.live.member"])
LIMIT = 120.0


def coordinate(pipe: Connection, lease: float, fences: bool, bind: str, port: int) -> None:
    coordinator, fence = Coordinator(lease=lease, report=10.0), kill if fences else spare
    server = Server(coordinator, bind=bind, port=port, fence=fence, open_to_all=True)
    pipe.send(server.address)
    server.serve()


class Service:
    """founders: members of the first epoch. The answers of those that ended are in `told`, by member."""

    def __init__(
        self,
        founders: int,
        *,
        experts: int = 8,
        lease: float = 20.0,
        fences: bool = True,
        start: bool = True,
        bind: str = "127.0.0.1",
        **part: Any,
    ) -> None:
        self._how = (lease, fences, bind)
        self.address = self._coordinate(0)
        self.part = Part(address=self.address, experts=experts, **part)
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self.pid_of: dict[int, int] = {}
        self.told: dict[int, Told] = {}
        self._ops = 0
        if start:
            self.found(founders)

    def _coordinate(self, port: int) -> str:
        ours, theirs = CONTEXT.Pipe()
        self.coordinator = CONTEXT.Process(target=coordinate, args=(theirs, *self._how, port), daemon=True)
        self.coordinator.start()
        theirs.close()
        assert ours.poll(LIMIT)
        return str(ours.recv())

    def lose_coordinator(self) -> None:
        """Whoever killed it, here or a member."""
        self.until(lambda: not is_alive(self.coordinator.pid or 0))
        self.coordinator.join()

    def restart_coordinator(self) -> None:
        """Where it was."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.coordinator.pid or 0, signal.SIGKILL)
        self.lose_coordinator()
        assert self._coordinate(int(self.address.rpartition(":")[2])) == self.address

    def found(self, founders: int, **changes: Any) -> None:
        for _ in range(founders):
            self.start(replace(self.part, plan=even(self.part.experts, founders), **changes))
        self.hear(founders)

    def start(self, part: Part | None = None) -> None:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=serve, args=(part or self.part, theirs), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        self.pipes.append(ours)

    def join(self, count: int = 1, **changes: Any) -> list[int]:
        """New members stand by. -> their numbers"""
        before = set(self.pid_of)
        for _ in range(count):
            self.start(replace(self.part, **changes))
        self.hear(len(before) + count)
        return sorted(set(self.pid_of) - before)

    def hear(self, members: int) -> None:
        """Until so many have told their numbers."""
        self.until(lambda: self._collect() or len(self.pid_of) >= members)

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        return ask(self.address, do, **fields)

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def scale(self, count: int) -> dict[str, Any]:
        self._ops += 1
        return self.ask("scale", op=f"scale-{self._ops}", count=count)

    def settle(self, state: str = "done") -> dict[str, Any]:
        """Until the last operation is over."""
        self.until(lambda: self.status()["operation"]["state"] not in ("pending", "running"))
        status = self.status()
        self._collect()
        assert status["operation"]["state"] == state, (status, self.told)
        return status

    def rest(self, members: int) -> dict[str, Any]:
        """Until so many serve and nothing is under way."""
        self.until(lambda: (s := self.status())["phase"] == "IDLE" and len(s["members"]) == members)
        return self.status()

    def steps(self, more: int) -> None:
        """Until every member that serves has done so many steps more."""
        now = self._steps()
        self.until(lambda: all(steps >= now.get(m, 0) + more for m, steps in self._steps().items()))

    def end(self) -> dict[int, Told]:
        """Scale to nobody; -> what those that lived on saw."""
        self.scale(0)
        self.settle()
        return self.gather()

    def gather(self) -> dict[int, Told]:
        self.until(lambda: self._collect() or not self.pipes)
        return self.told

    def backed_up(self) -> None:
        """Until every member that serves has the backups it is to keep."""
        self.until(lambda: self._backed(self.status()))

    def _backed(self, status: dict[str, Any]) -> bool:
        serving = [member for member in status["all"] if member["state"] == "serving"]
        return all(member["backed"] == status["epoch"] for member in serving)

    def heard(self, member: int) -> bool:
        """It ended, and told what it saw."""
        self._collect()
        return member in self.told

    def gather_errors(self, count: int) -> dict[int, Told]:
        """Until so many ended."""
        self.until(lambda: self._collect() or len(self.told) >= count)
        return self.told

    def kill(self, member: int) -> None:
        """If it lives, and however stopped it is."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid_of[member], signal.SIGKILL)

    def wake(self, member: int) -> None:
        os.kill(self.pid_of[member], signal.SIGCONT)

    def until(self, done: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT
        while not done():
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    raise AssertionError(f"not within {LIMIT:g} s; {self.status()}; {self.told}")
                raise AssertionError(f"not within {LIMIT:g} s; {self.told}")
            time.sleep(0.02)

    def _steps(self) -> dict[int, int]:
        return {m["member"]: m["step"] for m in self.status()["all"] if m["state"] == "serving"}

    def _collect(self) -> None:
        for pipe in list(self.pipes):
            try:
                while pipe.poll():
                    message = pipe.recv()
                    if isinstance(message, tuple):
                        self.pid_of[message[0]] = message[1]
                    else:
                        self.told[message.member] = message
            except (EOFError, OSError):
                self.pipes.remove(pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self.processes, self.coordinator):
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]  # a stopped one too
            process.join()
        for pipe in self.pipes:
            pipe.close()
