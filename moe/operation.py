"""Operations: what operators asked for, each under a name of its own. A target is absolute; asked twice it is done
once; one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe.roster import RefusedError

PENDING, RUNNING, DONE, ABORTED = "pending", "running", "done", "aborted"


@dataclass
class Operation:
    """name: the caller's. wanted: what was asked for, as it was asked: {"scale": 4} or {"drain": [2]}."""

    name: str
    wanted: Mapping[str, Any]
    state: str = PENDING
    reason: str = ""

    @property
    def open(self) -> bool:
        return self.state in (PENDING, RUNNING)

    def close(self, state: str, reason: str = "") -> None:
        if self.open:
            self.state, self.reason = state, reason

    def target(self, serving: tuple[int, ...], standby: list[int]) -> tuple[int, ...] | None:
        """Who is to serve; None as long as too few stand by. Who has served longest stays."""
        if "drain" in self.wanted:
            return tuple(member for member in serving if member not in self.wanted["drain"])
        more = self.wanted["scale"] - len(serving)
        if more > len(standby):
            self.reason = f"waits for {more - len(standby)} more members to stand by"
            return None
        return serving[: self.wanted["scale"]] if more <= 0 else (*serving, *sorted(standby)[:more])

    def fields(self) -> dict[str, Any]:
        return {"op": self.name, **self.wanted, "state": self.state, "reason": self.reason}


class Operations:
    """All that were ever asked for, and the last one."""

    def __init__(self) -> None:
        self.last: Operation | None = None
        self._known: dict[str, Operation] = {}

    @property
    def open(self) -> Operation | None:
        return self.last if self.last is not None and self.last.open else None

    def repeated(self, name: str, wanted: Mapping[str, Any], phase: str) -> Operation | None:
        """The operation of that name where there is one; raises where another is under way."""
        if (known := self._known.get(name)) is not None:
            if known.wanted != wanted:
                raise RefusedError(f"operation {name!r} is {dict(known.wanted)}, not {dict(wanted)}; use another name")
            return known
        if self.open is not None:
            raise RefusedError(f"operation {self.open.name!r} is under way ({phase}); wait for it, or cancel it")
        return None

    def named(self, name: str) -> Operation:
        if name not in self._known:
            raise RefusedError(f"no operation is called {name!r}; known are {sorted(self._known)}")
        return self._known[name]

    def add(self, operation: Operation) -> None:
        self._known[operation.name] = self.last = operation
