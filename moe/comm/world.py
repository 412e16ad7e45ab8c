"""World: a few gloo processes on this machine that run a function together, and never hang the caller.

For tests, benchmarks and `assert_ep_parity`, not for training: torchrun starts that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

START_SECONDS = 120.0  # to import torch in every process at once, on a busy machine


class WorldError(RuntimeError):
    """A rank failed or did not answer. The message holds every rank's traceback."""


class World:
    """`ranks` processes with one thread each, joined in a gloo group that meets in a file, so no port is taken.

    `run` calls a function on every rank and returns their results. If a rank raises, dies or outlasts the time-out,
    all are killed and WorldError says why; the next `run` starts new ones. Results come back pickled: copies.
    """

    def __init__(self, ranks: int, *, timeout: timedelta = timedelta(seconds=60)) -> None:
        if ranks < 1:
            raise ValueError(f"a World needs at least 1 rank; got {ranks}")
        self.ranks = ranks
        self.timeout = timeout
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], /, *args: Any) -> list[Any]:
        """function(*args) on every rank -> its results by rank. The function must be importable by its name."""
        job = pickle.dumps((function, args))
        try:
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                pipe.send_bytes(job)
            return self._collect(time.monotonic() + self.timeout.total_seconds())
        except BaseException:  # an interrupt too: no answer to this job may be taken for one to the next
            self.close()
            raise

    def close(self) -> None:
        """Kill the processes. Nothing outlives the world."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="evenmoe-")
        store = Path(self._folder.name) / "store"
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.ranks, str(store), self.timeout),
                daemon=True,
                name=f"rank-{rank}",
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(time.monotonic() + START_SECONDS)  # their word that they have met

    def _collect(self, deadline: float) -> list[Any]:
        """A failure leaves others waiting in a collective: give them a moment to say what they saw, then stop."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(self.ranks)))
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    good, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    good, answer = False, "the process died"
                (results if good else failures)[rank] = answer
            if failures:
                deadline = min(deadline, time.monotonic() + 2.0)
        if len(results) == self.ranks:
            return [results[rank] for rank in range(self.ranks)]
        self.close()
        silence = "no answer" if failures else "no answer in time"
        failures |= dict.fromkeys(waiting.values(), silence)
        raise WorldError("\n".join(f"--- rank {rank} of {self.ranks}: {failures[rank]}" for rank in sorted(failures)))


def _serve(pipe: Connection, rank: int, ranks: int, store: str, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    joined = partial(dist.init_process_group, "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone: so are we
        pipe.send_bytes(_answer(partial(joined, timeout=timeout)))
        while True:
            job = pipe.recv_bytes()
            pipe.send_bytes(_answer(partial(_do, job)))


def _do(job: bytes) -> Any:
    function, args = pickle.loads(job)
    return function(*args)


def _answer(work: Callable[[], Any]) -> bytes:
    """(True, result) or (False, traceback), pickled."""
    try:
        return pickle.dumps((True, work()))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


def world_group() -> dist.ProcessGroup | None:
    """The group of all ranks, None where there is none."""
    return dist.group.WORLD if dist.is_initialized() else None
