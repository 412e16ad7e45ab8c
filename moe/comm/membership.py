"""Membership: a member's line to the coordinator, kept alive by a thread of its own. And `ask`, an operator's."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe.comm.process import this_process
from moe.comm.secret import shared_secret
from moe.roster import FencedError, RefusedError

View = Mapping[str, Any]


class CoordinatorLostError(RuntimeError):
    """The coordinator is needed and does not answer."""


def ask(address: str | os.PathLike[str], do: str, timeout: float = 10.0, **fields: Any) -> dict[str, Any]:
    """One question of an operator's, answered; raises RefusedError with the coordinator's reason."""
    host, port = located(address)
    try:
        link = socket.create_connection((host, port), timeout)
    except OSError as error:
        raise ConnectionError(
            f"no coordinator answers at {host}:{port} ({error}); if none runs, `moe-elastic serve` starts one"
        ) from error
    with link, link.makefile("rwb") as stream:
        stream.write(json.dumps({"do": do, "secret": shared_secret(), **fields}).encode() + b"\n")
        stream.flush()
        answer = json.loads(stream.readline() or b'{"refused": "the coordinator hung up"}')
    if "ok" not in answer:
        raise RefusedError(answer.get("refused", str(answer)))
    return dict(answer["ok"])


def located(address: str | os.PathLike[str]) -> tuple[str, int]:
    """address: host:port, or a file that holds it."""
    text = os.fspath(address)
    if Path(text).is_file():
        text = Path(text).read_text().strip()
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{os.fspath(address)!r} is neither host:port nor a file that holds it")
    return host, int(port)


class Membership:
    """number: this member's, for good once somebody serves. view: the last the coordinator sent, None before the first.
    steps, the epoch that is backed up, and in training what an expert of each layer weighs, are told with each beat.

    The coordinator may go away: nothing here waits for it but `wait`; the line is tried again with every beat. One that
    was started anew is told the last view, and what was said since the epoch in it began.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        plan: str | None,
        slots: int = 0,
        portion: int = 0,
        beat: float = 0.5,
        timeout: float = 60.0,
    ) -> None:
        """plan: of a founder, as JSON. timeout: for the coordinator to be there and answer."""
        self._address, self._beat = address, beat
        self.view: View | None = None
        self.steps = self.backed = self.number = 0
        self.byte_L: tuple[int, ...] = ()
        self._refusal: Exception | None = None
        self._said: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended, self._sending, self._rest = threading.Event(), threading.Lock(), b""
        self._link = self._connected(time.monotonic() + timeout)
        self.here: str = self._link.getsockname()[0]
        self.there: str = self._link.getpeername()[0]
        about = {"plan": plan, "slots": slots, "portion": portion, "process": this_process()}
        self._hello = {"do": "hello", "secret": shared_secret(), **about}
        self._say(self._hello)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="membership")
        self._thread.start()
        try:
            self.wait(lambda view: True, timeout)
        except BaseException:
            self.close()
            raise

    def tell(self, do: str, **fields: Any) -> None:
        """An event; a coordinator that is away hears of it when it is back."""
        message = {"do": do, **fields}
        with self._changed:
            if do in ("reached", "failed"):
                serving = 0 if self.view is None or self.view["epoch"] is None else self.view["epoch"]["number"]
                self._said = [said for said in self._said if said["epoch"] >= serving] + [message]
        self._say(message)

    def wait(self, ready: Callable[[View], bool], timeout: float, wake: Callable[[], bool] = lambda: False) -> View:
        """The first view of that kind, or any once `wake` holds; raises FencedError where this member was given up."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self.check()
                if self.view is not None and (ready(self.view) or wake()):
                    return self.view
                if (left := deadline - time.monotonic()) <= 0:
                    raise CoordinatorLostError(f"{self._address}: nothing in {timeout:g} s of what was waited for")
                self._changed.wait(min(left, self._beat))

    @property
    def host_of(self) -> dict[int, str]:
        """Of each member that lives, where it was when it came."""
        living = {} if self.view is None else self.view["living"]
        return {int(number): told["process"].get("host", "") for number, told in living.items()}

    def wake(self) -> None:
        """Let who waits look again."""
        with self._changed:
            self._changed.notify_all()

    def check(self) -> None:
        """Raises if the coordinator refused this member."""
        if self._refusal is not None:
            raise self._refusal
        if self.view is not None and self.number in self.view["dead"]:
            raise FencedError(f"member {self.number} was given up for dead; start again as a new member")

    def close(self) -> None:
        """Leave; a member that serves is given up for dead when its process ends or its lease is over."""
        self._say({"do": "bye"})
        self._ended.set()
        self._thread.join(2 * self._beat + 1)
        self._link.close()

    def _connected(self, deadline: float) -> socket.socket:
        while True:
            try:
                link = socket.create_connection(located(self._address), timeout=5.0)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except (OSError, ValueError) as error:  # perhaps it is about to be there
                if time.monotonic() > deadline:
                    raise CoordinatorLostError(f"no coordinator at {self._address}: {error}") from error
                time.sleep(0.1)
            else:
                return link

    def _say(self, message: Mapping[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._link.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        due = time.monotonic()
        while not self._ended.is_set():
            if self.number and time.monotonic() >= due:
                due = time.monotonic() + self._beat
                self._say({"do": "beat", "step": self.steps, "backed": self.backed, "byte_L": self.byte_L})
            poll = select.poll()  # select.select() takes no descriptor above 1023, and a process may have many
            poll.register(self._link, select.POLLIN)
            if poll.poll(1000 * self._beat / 2) and not self._hear():
                self._again()

    def _hear(self) -> bool:
        try:
            data = self._link.recv(2**20)
        except OSError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            with self._changed:
                if "you" in message:
                    self.number = int(message["you"])
                elif "view" in message:
                    self.view = message["view"]
                elif "fenced" in message:
                    self._refusal = FencedError(message["fenced"])
                elif self.view is None or self.view["epoch"] is None:
                    self._refusal = RefusedError(message["refused"])
                self._changed.notify_all()
        return bool(data)

    def _again(self) -> None:
        """The line is cut: try once a beat."""
        self._link.close()
        self._rest = b""
        while not self._ended.wait(self._beat):
            with contextlib.suppress(CoordinatorLostError):
                self._link = self._connected(0.0)
                self._say(self._hello if self.view is None else self._news())
                return
        self._link = socket.socket()

    def _news(self) -> dict[str, Any]:
        """Who this is, for a coordinator that may never have heard of it."""
        with self._changed:
            about = {"view": self.view, "said": list(self._said), "hello": self._hello}
        process, secret = self._hello["process"], self._hello["secret"]
        return {"do": "again", "member": self.number, "process": process, "secret": secret, **about}
