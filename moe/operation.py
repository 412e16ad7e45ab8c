"""Operations: what operators asked for, each under a name of its own. A target is absolute; asked twice it is done
once; one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from moe.roster import RefusedError
from placement import Plan

PENDING, RUNNING, DONE, ABORTED = "pending", "running", "done", "aborted"


@dataclass
class Operation:
    """name: the caller's. wanted: what was asked for, as it was asked: {"scale": 4}, {"drain": [2]} or {"place": the
    plan's fingerprint}. plan: where experts are to live, if that was asked for."""

    name: str
    wanted: Mapping[str, Any]
    plan: Plan | None = None
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
        if "place" in self.wanted:
            return serving
        if "drain" in self.wanted:
            return tuple(member for member in serving if member not in self.wanted["drain"])
        more = self.wanted["scale"] - len(serving)
        if more > len(standby):
            self.reason = f"waits for {more - len(standby)} more members to stand by"
            return None
        return serving[: self.wanted["scale"]] if more <= 0 else (*serving, *sorted(standby)[:more])

    def fields(self) -> dict[str, Any]:
        return {"op": self.name, **self.wanted, "state": self.state, "reason": self.reason}

    def kept(self) -> dict[str, Any]:
        """For members to keep; the plan only as long as it is to be carried out."""
        plan = self.plan.to_json() if self.plan is not None and self.open else None
        return asdict(replace(self, plan=None)) | {"wanted": dict(self.wanted), "plan": plan}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        plan = None if fields["plan"] is None else Plan.from_json(fields["plan"], source="the plan of an operation")
        return cls(**{**fields, "plan": plan})


class Operations:
    """All that were ever asked for, and the last one. kept: the last of them, which a coordinator that is started anew
    hears of; what was done under older names would be done again."""

    KEPT = 32

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

    @property
    def kept(self) -> list[dict[str, Any]]:
        return [operation.kept() for operation in list(self._known.values())[-self.KEPT :]]
