"""Server: a Coordinator with a socket, a clock, and the store in which groups meet. One line of JSON a message.

A member keeps its connection: it says hello, beats, tells what it is done with, and is sent a view whenever that is
new. An operator asks one thing and gets one answer.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe.comm.process import is_alive, is_here, kill
from moe.comm.standby import store_server
from moe.coordinator import Coordinator
from moe.course import Phase
from moe.recovery import Inventory
from moe.roster import FencedError, RefusedError, State
from moe.view import status, view
from placement import Plan

TICK = 0.05
Fence = Callable[[Mapping[str, Any]], None]


class _Line:
    """A connection, and the member at its other end."""

    def __init__(self, link: socket.socket) -> None:
        self.link, self.member, self.seen, self.rest = link, 0, -1, b""
        self.out = b""

    def lines(self) -> list[dict[str, Any]] | None:
        """What came; None where the other end is gone."""
        try:
            data = self.link.recv(2**16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in whole]

    def say(self, message: Mapping[str, Any]) -> None:
        self.out += json.dumps(message).encode() + b"\n"

    def flush(self) -> None:
        """As much as goes; who does not read does not keep the others waiting."""
        while self.out:
            try:
                self.out = self.out[self.link.send(self.out) :]
            except BlockingIOError:
                return
            except OSError:
                self.out = b""


class Server:
    """address: where members and operators find it. fence: what is done to the process of a member given up for dead;
    `kill` ends those of this machine, others are refused when they come back."""

    def __init__(
        self, coordinator: Coordinator, *, bind: str = "127.0.0.1", port: int = 0, fence: Fence = kill
    ) -> None:
        self.coordinator, self._fence = coordinator, fence
        self._store = store_server(bind)
        self._listener = socket.create_server((bind, port))
        self._listener.setblocking(False)
        self.address = f"{bind}:{self._listener.getsockname()[1]}"
        self._lines: dict[socket.socket, _Line] = {}
        self._fenced: set[int] = set()
        self._left: set[int] = set()
        self._ended = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def save_address(self, path: str | os.PathLike[str]) -> None:
        """For members on a shared file system: whole, or not there."""
        partial = Path(f"{path}.partial")
        partial.write_text(self.address + "\n")
        partial.rename(path)

    def serve(self) -> None:
        """Until stop()."""
        last = time.monotonic()
        while not self._ended.is_set():
            for key, _ in self._selector.select(TICK):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(self._lines[key.fileobj])  # type: ignore[index]
            now = time.monotonic()
            if now - last > self.coordinator.roster.lease / 2:
                self.coordinator.roster.excuse(now - last)  # it was this process that did not listen
            last = now
            self.coordinator.tick(now)
            self._see_to_the_dead()
            for line in list(self._lines.values()):
                if line.member and line.seen != self.coordinator.version:
                    line.seen = self.coordinator.version
                    line.say({"view": view(self.coordinator) | {"store": self._store.port}})
                line.flush()
        for line in list(self._lines.values()):
            self._close(line)
        self._selector.close()
        self._listener.close()

    def start(self) -> threading.Thread:
        """In a thread of this process, which should not be a worker's: what it serves should outlive any of them."""
        thread = threading.Thread(target=self.serve, daemon=True, name="coordinator")
        thread.start()
        return thread

    def stop(self) -> None:
        self._ended.set()

    def _accept(self) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:  # who called hung up, or no descriptor is free: no reason to end the service
            return
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines[link] = _Line(link)
        self._selector.register(link, selectors.EVENT_READ)

    def _close(self, line: _Line) -> None:
        self._selector.unregister(line.link)
        del self._lines[line.link]
        line.link.close()
        if line.member:
            self._left.add(line.member)

    def _read(self, line: _Line) -> None:
        try:
            messages = line.lines()
            if messages is None:
                self._close(line)
                return
            for message in messages:
                answer = self._do(line, message)
                if answer is not None:
                    line.say(answer)
        except (FencedError, RefusedError) as error:
            line.say({"fenced" if isinstance(error, FencedError) else "refused": str(error)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            line.say({"refused": f"not a message that is understood: {error!r}"})

    def _do(self, line: _Line, message: dict[str, Any]) -> dict[str, Any] | None:
        now, coordinator = time.monotonic(), self.coordinator
        match message.pop("do"):
            case "hello":
                plan = message.pop("plan")
                plan = None if plan is None else Plan.from_json(plan, source="the founder's plan")
                line.member = coordinator.hello(now, plan=plan, **message)
                return {"you": line.member}
            case "again":
                coordinator.roster.hear(now, message["member"])
                line.member = message["member"]
                self._left.discard(line.member)
            case "beat":
                coordinator.beat(now, line.member, message["step"], message["backed"], message["byte_L"])
            case "reached":
                coordinator.reached(now, line.member, message["epoch"], Phase(message["phase"]))
            case "failed":
                coordinator.failed(now, line.member, message["epoch"], message["reason"])
            case "broken":
                coordinator.broken(now, line.member, message["epoch"], Inventory.read(message["inventory"]))
            case "bye":
                coordinator.bye(now, line.member)
            case "status":
                return {"ok": status(coordinator)}
            case "scale":
                return {"ok": coordinator.scale(now, message["op"], message["count"])}
            case "drain":
                return {"ok": coordinator.drain(now, message["op"], message["members"])}
            case "cancel":
                return {"ok": coordinator.cancel(now, message["op"])}
            case other:
                raise RefusedError(f"nobody can {other!r}")
        return None

    def _see_to_the_dead(self) -> None:
        """Who hung up may have died: of a process on this machine that can be seen, of another only the lease tells."""
        members = self.coordinator.roster.members
        for number in sorted(self._left):
            process = members[number].process
            if members[number].state == State.DEAD or not is_here(process):
                self._left.discard(number)
            elif not is_alive(process):
                self._left.discard(number)
                self.coordinator.gone(time.monotonic(), number)
        for member in self.coordinator.roster.members.values():
            if member.state == State.DEAD and member.number not in self._fenced:
                self._fenced.add(member.number)
                if member.reason != "left":
                    self._fence(member.process)
