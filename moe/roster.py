"""Roster: who there is. Numbers are given out upwards and never again; who is silent longer than a lease is dead, and
who is dead stays dead, however alive its process may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

LEFT = "left"


class RefusedError(ValueError):
    """What was asked for cannot be; why, in words for whoever asked."""


class FencedError(RefusedError):
    """This member was given up for dead. It may not go on under its number."""


class State(StrEnum):
    STANDBY = "standby"
    SERVING = "serving"
    RELEASED = "released"
    DEAD = "dead"


@dataclass
class Member:
    """slots: the most experts of a layer it can hold, 0 for any number. process: where it runs, for who fences it.
    backed: the last epoch for which it has the backups it is to keep."""

    number: int
    seen: float
    slots: int = 0
    process: Mapping[str, Any] = field(default_factory=dict)
    state: State = State.STANDBY
    step: int = 0
    backed: int = 0
    reason: str = ""

    def fields(self) -> dict[str, Any]:
        return {
            "member": self.number,
            "state": str(self.state),
            "step": self.step,
            "backed": self.backed,
            "reason": self.reason,
        }


class Roster:
    def __init__(self, lease: float) -> None:
        if lease <= 0:
            raise ValueError(f"lease={lease}; use the seconds after which a silent member is given up for dead")
        self.lease = lease
        self.members: dict[int, Member] = {}
        self.count = 0

    def enter(self, now: float, slots: int, process: Mapping[str, Any]) -> Member:
        self.count += 1
        member = Member(number=self.count, seen=now, slots=slots, process=dict(process))
        self.members[member.number] = member
        return member

    def hear(self, now: float, number: int) -> Member:
        """A living member speaks."""
        member = self.members.get(number)
        if member is None and 0 < number <= self.count:
            raise FencedError(f"member {number} is not known any more; start again as a new member")
        if member is None:
            raise RefusedError(f"nobody is member {number}; say hello first")
        if member.state == State.DEAD:
            raise FencedError(f"member {number} was given up: {member.reason}; start again as a new member")
        member.seen = now
        return member

    def again(self, now: float, number: int, process: Mapping[str, Any]) -> None:
        """A member whose line was cut is back."""
        if self.hear(now, number).process != process:
            raise FencedError(f"member {number} is another process by now; start again as a new member")

    def forget(self, number: int) -> None:
        """Who left, and will not be back."""
        del self.members[number]

    def fill(self, now: float, view: Mapping[str, Any], serving: Iterable[int]) -> None:
        """With all that a view tells of: an earlier roster's."""
        self.count = view["count"]
        for number in view["dead"]:
            self.members[number] = Member(number=number, seen=now, state=State.DEAD, reason="was given up earlier")
        for name, told in view["living"].items():
            number = int(name)
            state = State.RELEASED if number in view["released"] else State.STANDBY
            state = State.SERVING if number in serving else state
            process = told["process"]
            self.members[number] = Member(number=number, seen=now, slots=told["slots"], process=process, state=state)

    def excuse(self, seconds: float) -> None:
        """Nobody was listened to for so long."""
        for member in self.members.values():
            member.seen += seconds

    def silent(self, now: float) -> list[Member]:
        """Whose lease is over."""
        return [m for m in self.living() if m.state != State.RELEASED and now - m.seen > self.lease]

    def living(self, among: Iterable[int] | None = None) -> list[Member]:
        numbers = self.members if among is None else [n for n in among if n in self.members]
        return [self.members[n] for n in numbers if self.members[n].state != State.DEAD]

    def numbers(self, state: State) -> list[int]:
        return [member.number for member in self.members.values() if member.state == state]
