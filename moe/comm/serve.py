"""Server: a Coordinator with a socket, a clock, and the store in which groups meet. One line of JSON a message.

A member keeps its connection: it says hello, beats, tells what it is done with, and is sent a view whenever that is
new. An operator asks one thing and gets one answer. Views are sent before answers: what an operator was told, members
keep for a coordinator that is started anew. That one hears them (moe.adoption) before it does anything.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe.adoption import Adoption, can_be_adopted
from moe.comm.line import Line
from moe.comm.process import has_ended, is_here, kill
from moe.comm.secret import VARIABLE, is_same, require_secret, shared_secret
from moe.comm.standby import store_server
from moe.coordinator import Coordinator
from moe.course import Phase
from moe.recovery import Inventory
from moe.roster import LEFT, FencedError, RefusedError, State
from moe.view import running, status, view
from placement import Plan

TICK = 0.05
Fence = Callable[[Mapping[str, Any]], None]


class Server:
    """address: where members and operators find it. fence: what is done to the process of a member given up for dead;
    `kill` ends those of this machine, others are refused when they come back. open_to_all: on an address that other
    machines can reach, without a secret."""

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        bind: str = "127.0.0.1",
        port: int = 0,
        fence: Fence = kill,
        open_to_all: bool = False,
    ) -> None:
        self.coordinator, self._fence, self._secret = coordinator, fence, shared_secret()
        require_secret(bind, self._secret, open_to_all=open_to_all)
        coordinator.service = coordinator.service or uuid.uuid4().hex
        self._store = store_server(bind)
        self._listener = socket.create_server((bind, port))
        self._listener.setblocking(False)
        self.address = f"{bind}:{self._listener.getsockname()[1]}"
        self._lines: dict[socket.socket, Line] = {}
        self._fenced: set[int] = set()
        self._left: set[int] = set()
        self._adoption: Adoption | None = None
        self._held: list[tuple[Line, dict[str, Any]]] = []
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
            self._see_to_the_held(now)
            self._see_to_the_dead()
            for line in sorted(self._lines.values(), key=lambda line: not line.member):
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
        self._lines[link] = Line(link, known=not self._secret)
        self._selector.register(link, selectors.EVENT_READ)

    def _close(self, line: Line) -> None:
        self._selector.unregister(line.link)
        del self._lines[line.link]
        line.link.close()
        if line.member:
            self._left.add(line.member)

    def _read(self, line: Line) -> None:
        try:
            messages = line.lines()
        except ValueError as error:
            line.say({"refused": f"not a message that is understood: {error!r}"})
            return
        if messages is None:
            self._close(line)
            return
        for message in messages:
            self._answer(line, message)

    def _answer(self, line: Line, message: dict[str, Any]) -> None:
        try:
            if (answer := self._do(line, message)) is not None:
                line.say(answer)
        except (FencedError, RefusedError) as error:
            line.say({"fenced" if isinstance(error, FencedError) else "refused": str(error)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            line.say({"refused": f"not a message that is understood: {error!r}"})

    def _admit(self, line: Line, message: Mapping[str, Any]) -> None:
        if not line.known:
            if not is_same(str(message.get("secret", "")), self._secret):
                raise RefusedError(f"{VARIABLE} is not set there, or not to the coordinator's; set it for all alike")
            line.known = True

    def _do(self, line: Line, message: dict[str, Any]) -> dict[str, Any] | None:
        self._admit(line, message)
        now, coordinator = time.monotonic(), self.coordinator
        if self._waits(message):
            self._held.append((line, message))
            return None
        match message["do"]:
            case "hello":
                plan = message["plan"]
                plan = None if plan is None else Plan.from_json(plan, source="the founder's plan")
                rest = {name: message[name] for name in ("slots", "portion", "process")}
                line.member = coordinator.hello(now, plan=plan, **rest)
                return {"you": line.member}
            case "again":
                return self._again(line, message)
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
            case _:
                return {"ok": self._asked(message)}
        return None

    def _asked(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """By an operator."""
        now, coordinator = time.monotonic(), self.coordinator
        match message["do"]:
            case "status":
                adopting = {} if self._adoption is None else {"phase": Phase.ADOPT.name}
                return status(coordinator) | adopting
            case "plan":
                return running(coordinator)
            case "scale":
                return coordinator.scale(now, message["op"], message["count"])
            case "drain":
                return coordinator.drain(now, message["op"], message["members"])
            case "place":
                return coordinator.place(now, message["op"], Plan.from_json(message["plan"], source="the plan"))
            case "cancel":
                return coordinator.cancel(now, message["op"])
            case other:
                raise RefusedError(f"nobody can {other!r}")

    def _waits(self, message: Mapping[str, Any]) -> bool:
        """Until it is known who serves: who comes has no number before, and what members say is heard in order."""
        do = message["do"]
        if self._adoption is None:
            return bool(do == "hello" and message["plan"] is None and self.coordinator.epoch is None)
        if do in ("scale", "drain", "place", "plan", "cancel"):
            raise RefusedError("members of a service that runs are being heard; ask again in a moment")
        return do not in ("again", "status", "beat")

    def _again(self, line: Line, message: dict[str, Any]) -> dict[str, Any] | None:
        """A member whose line was cut, perhaps because another coordinator ended."""
        coordinator, number, its = self.coordinator, message["member"], message["view"]
        if coordinator.epoch is None and can_be_adopted(its):
            if self._adoption is None:
                self._begin_anew(its["service"])
            assert self._adoption is not None
            self._adoption.hear(number, its, message["said"])
            self._held.append((line, message))
            return None
        if its is None or its["service"] != coordinator.service:
            if can_be_adopted(its):
                raise RefusedError("another service is looked after here")
            return self._do(line, message["hello"])
        coordinator.roster.again(time.monotonic(), number, message["process"])
        line.member = number
        (self._left.discard if line.link in self._lines else self._left.add)(number)
        for said in message["said"]:
            self._answer(line, said)
        return None

    def _begin_anew(self, service: str) -> None:
        """With members of a service that runs; who was about to found another cannot."""
        self._adoption = Adoption(time.monotonic() + self.coordinator.roster.lease, service)
        self.coordinator.roster.members.clear()
        self._left.clear()
        for line in self._lines.values():
            if line.member:
                line.member = 0
                line.say({"fenced": "members of a service that runs came back; join it, without a plan"})

    def _see_to_the_held(self, now: float) -> None:
        if self._adoption is not None and self._adoption.over(now, has_ended):
            self._adoption.into(self.coordinator, now)
            self._left |= set(self._adoption.missing)
            self._adoption = None
        if self._adoption is None and self.coordinator.epoch is not None:
            held, self._held = self._held, []
            for line, message in held:
                if line.link in self._lines or message["do"] != "hello":
                    self._answer(line, message)

    def _see_to_the_dead(self) -> None:
        """Who hung up may have died: of a process on this machine that can be seen, of another only the lease tells."""
        members = self.coordinator.roster.members
        self._left &= members.keys()
        for number in sorted(self._left):
            process, state = members[number].process, members[number].state
            if state == State.DEAD or not is_here(process):
                self._left.discard(number)
            elif has_ended(process):
                self._left.discard(number)
                self.coordinator.gone(time.monotonic(), number)
            ended = number not in self._left and members[number].state == State.DEAD
            if ended and (members[number].reason == LEFT or state == State.RELEASED):
                self.coordinator.roster.forget(number)
        for member in self.coordinator.roster.members.values():
            if member.state == State.DEAD and member.number not in self._fenced:
                self._fenced.add(member.number)
                if member.reason != LEFT:
                    self._fence(member.process)
