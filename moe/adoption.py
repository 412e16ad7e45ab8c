"""Adoption: a coordinator that was started anew takes over a service that runs.

A view has all that the coordinator before knew and a member can have acted upon; each member keeps the last it was
sent, and what it has said since. So the newest view of all members, and what they said, are where the old one stood as
far as anybody saw, and the new one goes on as if it had been the old one, stopped for a while: a change under way is
finished, votes and all, a request is carried out, who was dead stays dead. Who does not come back within a lease of
time is silent as anybody is, and given up. A change whose members were still meeting is begun again under another
number, as the place where they met went with the old coordinator.

What the old one knew and no member was sent is lost: a request or a death of its last moment, and requests that were
done under names older than the last `Operations.KEPT`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe.coordinator import Coordinator
from moe.course import Course, Phase
from moe.epoch import Change, Epoch
from moe.operation import Operation
from moe.recovery import Mark, Repair, Restore
from moe.roster import RefusedError

View = Mapping[str, Any]


def can_be_adopted(view: View | None) -> bool:
    """Somebody serves, or did."""
    return view is not None and view["epoch"] is not None


class Adoption:
    """until: when it is over at the latest. service: whose members are heard."""

    def __init__(self, until: float, service: str) -> None:
        self.until, self.service = until, service
        self._view_of: dict[int, View] = {}
        self._reached: list[tuple[int, int, Phase]] = []

    def hear(self, member: int, view: View, said: Sequence[Mapping[str, Any]]) -> None:
        """said: what it told the coordinator before."""
        if view["service"] != self.service:
            raise RefusedError(f"member {member} is of another service than those that are being heard")
        self._view_of[member] = view
        self._reached += [(member, m["epoch"], Phase(m["phase"])) for m in said if m["do"] == "reached"]

    @property
    def newest(self) -> View:
        return max(self._view_of.values(), key=lambda view: int(view["version"]))

    @property
    def missing(self) -> list[int]:
        """Who may know more. Who was let go is not waited for."""
        newest = self.newest
        waited = {int(number) for number in newest["living"]} - set(newest["released"])
        return sorted(waited - self._view_of.keys())

    def over(self, now: float, ended: Callable[[Mapping[str, Any]], bool] = lambda process: False) -> bool:
        """ended: whether a process is known to be no more."""
        living = self.newest["living"]
        return now > self.until or all(ended(living[str(number)]["process"]) for number in self.missing)

    def into(self, coordinator: Coordinator, now: float) -> None:
        """A coordinator that knows nobody goes on from the newest view. What members said has yet to be told to it."""
        view = self.newest
        coordinator.service, coordinator.version = self.service, view["version"] + 1
        coordinator.numbers, coordinator.portion = view["numbers"], view["portion"]
        coordinator.epoch = epoch = Epoch.read(view["epoch"])
        coordinator.restores = tuple(Restore(**fields) for fields in view["restores"])
        coordinator.mark = None if view["mark"] is None else Mark(*view["mark"])
        coordinator.lost = {int(layer): tuple(experts) for layer, experts in view["lost"].items()}
        coordinator.settling = set(view["settling"])
        coordinator.course = course = self._course(view, epoch)
        serving = {*epoch.members, *(course.change.old.members if course is not None else ())}
        coordinator.roster.fill(now, view, serving)
        for fields in view["operations"]:
            coordinator.operations.add(Operation.read(fields))
        if view["report"]:
            until = now + coordinator.roster.lease + coordinator.report
            coordinator.repair = Repair(until=until, reason="members failed", found={})
        coordinator._moved()  # members may have nothing more to say

    def _course(self, view: View, epoch: Epoch) -> Course | None:
        """None where some were still meeting, at a place that is no more. But where somebody has met, and somebody else
        did not come back, who may be dead, what the first has of the change may be all there is: it stays until all
        have reported."""
        if view["change"] is None:
            return None
        course = Course(Change.read(view["change"]))
        number = course.change.new.number
        course.go, course.flipped = view["go"], number == epoch.number
        met = [(member, phase) for member, of, phase in self._reached if of == number]
        for member, phase in met:
            course.hear(member, phase)
        unheard = set(course.change.union) - self._view_of.keys()
        return course if course.go or course.phase > Phase.PREPARE or (unheard and met) else None
