"""Roster: who there is. Numbers are given out upwards and never again; who is silent longer than a lease is dead, and
who is dead stays dead, however alive its process may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


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
        self._count = 0

    def enter(self, now: float, slots: int, process: Mapping[str, Any]) -> Member:
        self._count += 1
        member = Member(number=self._count, seen=now, slots=slots, process=dict(process))
        self.members[member.number] = member
        return member

    def hear(self, now: float, number: int) -> Member:
        """A living member speaks."""
        member = self.members.get(number)
        if member is None:
            raise RefusedError(f"nobody is member {number}; say hello first")
        if member.state == State.DEAD:
            raise FencedError(f"member {number} was given up: {member.reason}; start again as a new member")
        member.seen = now
        return member

    def excuse(self, seconds: float) -> None:
        """Nobody was listened to for so long."""
        for member in self.members.values():
            member.seen += seconds

    def silent(self, now: float) -> list[Member]:
        """Whose lease is over."""
        return [m for m in self.living() if m.state != State.RELEASED and now - m.seen > self.lease]

    def living(self, among: Iterable[int] | None = None) -> list[Member]:
        numbers = self.members if among is None else among
        return [self.members[n] for n in numbers if self.members[n].state != State.DEAD]

    def numbers(self, state: State) -> list[int]:
        return [member.number for member in self.members.values() if member.state == state]
