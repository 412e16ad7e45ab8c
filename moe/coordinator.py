"""Coordinator: what is to change about who serves, and how far it is. No clock, no socket, no process: events come in
with their time, `view` goes out to the members.

A target is absolute ("4 members"), a request has a name: asked twice it is done once. One request at a time. A death
before READY among those who come costs a request, never a step. A death among those who serve: every survivor reports
what it has, and `recovered` says how they go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from moe.course import Course, Phase
from moe.epoch import Change, Epoch, Stage, changes, same_homes
from moe.operation import ABORTED, DONE, RUNNING, Operation, Operations
from moe.recovery import ExpertsLostError, Inventory, Mark, Repair, Restore, common, recovered
from moe.roster import LEFT, Member, RefusedError, Roster, State
from placement import Plan

Process = Mapping[str, Any]
NOWHERE: Process = {}


class Coordinator:
    """lease: seconds of silence after which a member is dead. report: seconds beyond a lease that a survivor may take
    to notice a death, at least the time-out of its collectives. service: a name for those it looks after, unlike any
    other's. numbers: of epochs, the last given out. settling: who has yet to do a step in an epoch after a death.

    All it knows and anybody acts upon is in the view that members have: see moe.adoption."""

    def __init__(self, *, lease: float = 5.0, report: float = 60.0, service: str = "") -> None:
        self.roster, self.report, self.service = Roster(lease), report, service
        self.epoch: Epoch | None = None
        self.course: Course | None = None
        self.operations = Operations()
        self.repair: Repair | None = None
        self.restores: tuple[Restore, ...] = ()
        self.mark: Mark | None = None
        self.settling: set[int] = set()
        self.version = self.numbers = self.portion = 0
        self._byte_L: tuple[int, ...] = ()
        self._founding: dict[int, Plan] = {}
        self.lost: dict[int, tuple[int, ...]] = {}

    def hello(
        self, now: float, *, plan: Plan | None, slots: int = 0, portion: int = 0, process: Process = NOWHERE
    ) -> int:
        """Somebody new. plan: of a founder, the same from each, with as many ranks as there are founders; None of who
        comes later, who stands by until it is wanted. slots: experts of a layer it can hold, 0 for any number. portion:
        bytes of experts that may go to or from a rank at a step boundary; 0 for any number.
        -> its number"""
        if plan is not None and self.epoch is not None:
            raise RefusedError(f"epoch {self.epoch.number} serves already; join it, without a plan")
        for other in self._founding.values() if plan is not None else ():
            if plan is not None and other.fingerprint != plan.fingerprint:
                raise RefusedError(f"this plan is {plan.fingerprint[:12]}, another founder's {other.fingerprint[:12]}")
        if self.epoch is not None and not self.epoch.members:
            raise RefusedError("the service was scaled to nobody; start a new coordinator")
        if self.roster.members and portion != self.portion:
            raise RefusedError(f"portion={portion}, but earlier members have {self.portion}; all must move alike")
        self.portion = portion
        member = self.roster.enter(now, slots, process)
        if plan is not None:
            self._founding[member.number] = plan
            if len(self._founding) == plan.ranks:
                self.epoch = Epoch(number=self._next(), members=tuple(self._founding), plan=plan)
                for founder in self.roster.living(self.epoch.members):
                    founder.state = State.SERVING
        self._moved()
        return member.number

    def beat(self, now: float, number: int, step: int = 0, backed: int = 0, byte_L: Sequence[int] = ()) -> None:
        """byte_L: what an expert of each layer weighs; who has none of a layer may know less."""
        member = self.roster.hear(now, number)
        member.step, member.backed = step, backed
        heaviest_L = tuple(map(max, zip_longest(byte_L, self._byte_L, fillvalue=0)))
        if heaviest_L != self._byte_L:
            self._byte_L = heaviest_L
            self._moved()

    def reached(self, now: float, number: int, epoch: int, phase: Phase) -> None:
        """A member is done with a phase of the change to an epoch, or, with FREE, has done a step in one."""
        self.roster.hear(now, number)
        if self.epoch is not None and epoch == self.epoch.number and phase == Phase.FREE:
            self.settling.discard(number)
        if self.course is not None and epoch == self.course.change.new.number:
            self.course.hear(number, phase)
            if phase >= Phase.FLIP:
                self._flip(self.course)
        self._moved()

    def failed(self, now: float, number: int, epoch: int, reason: str) -> None:
        """A member could not prepare or copy."""
        self.roster.hear(now, number)
        if self.course is not None and epoch == self.course.change.new.number and not self.course.go:
            self._abort(f"member {number}: {reason}")
        self._moved()

    def broken(self, now: float, number: int, epoch: int, inventory: Inventory) -> None:
        """A member's step was cut short, in that epoch; it waits for another."""
        self.roster.hear(now, number)
        current = set() if self.epoch is None else {self.epoch.number}
        if (course := self.course) is not None:
            current |= {course.change.old.number, course.change.new.number}
            if epoch == course.change.new.number and number in course.change.old.members:
                self._flip(course)
        if epoch not in current:
            return  # an echo: it will see the epoch that came since
        self.repair = self.repair or self._repair(now, f"member {number} saw its peers fail")
        self.repair.found[number] = inventory
        self._moved()

    def bye(self, now: float, number: int) -> None:
        """Who is released, or was never wanted, goes."""
        if self.roster.hear(now, number).state == State.SERVING:
            raise RefusedError(f"member {number} serves; drain it first")
        self.gone(now, number, LEFT)

    def gone(self, now: float, number: int, reason: str = "its process ended") -> None:
        """A process is known to have ended."""
        self._die(now, self.roster.members[number], reason)
        self._moved()

    def tick(self, now: float) -> None:
        """Time passes."""
        lost = [(member, f"was not heard of for {self.roster.lease:g} s") for member in self.roster.silent(now)]
        if self.repair is not None and now > self.repair.until:
            mute = [number for number in self.expected() if number not in self.repair.found]
            lost += [(member, "did not report after a failure") for member in self.roster.living(mute)]
        for member, reason in lost:
            self._die(now, member, reason)
        if lost:
            self._moved()

    def scale(self, now: float, op: str, count: int) -> dict[str, Any]:
        if count < 0:
            raise RefusedError(f"cannot scale to {count} members; use a number >= 0")
        return self._ask(op, {"scale": count})

    def drain(self, now: float, op: str, members: Sequence[int]) -> dict[str, Any]:
        return self._ask(op, {"drain": sorted(set(members))})

    def place(self, now: float, op: str, plan: Plan) -> dict[str, Any]:
        """The same members, and their experts as a plan has them: its ranks are the members in their order."""
        return self._ask(op, {"place": plan.fingerprint}, plan)

    def cancel(self, now: float, op: str) -> dict[str, Any]:
        operation = self.operations.named(op)
        if operation.open:
            if self.course is not None and self.course.go:
                raise RefusedError(f"{op!r} is past READY and cannot be taken back; ask for what should be instead")
            self._abort("cancelled")
            self._moved()
        return operation.fields()

    def _ask(self, name: str, wanted: dict[str, Any], plan: Plan | None = None) -> dict[str, Any]:
        if (known := self.operations.repeated(name, wanted, self.phase.name)) is not None:
            return known.fields()
        if self.epoch is None:
            raise RefusedError("nobody serves yet")
        if strangers := [member for member in wanted.get("drain", ()) if member not in self.epoch.members]:
            raise RefusedError(f"members {strangers} do not serve; those who do are {list(self.epoch.members)}")
        if wanted.get("drain") == sorted(self.epoch.members):
            raise RefusedError("nobody would be left; to end the service, scale to 0")
        operation = Operation(name, wanted, plan)
        self._way(operation)  # what cannot be is refused before anything moves
        self.operations.add(operation)
        self._moved()
        return operation.fields()

    def _way(self, operation: Operation) -> tuple[Stage, ...]:
        """What is left to do, step by step; nothing as long as too few stand by, or nobody knows what experts weigh."""
        assert self.epoch is not None
        members = operation.target(self.epoch.members, self.roster.numbers(State.STANDBY))
        if members and self.portion and not min(self._byte_L, default=0):
            operation.reason, members = "waits for a step, after which members know what an expert weighs", None
        if members is None:
            return ()
        slots_of = {member.number: member.slots for member in self.roster.living()}
        try:
            return changes(
                self.epoch, members, slots_of, portion=self.portion, byte_L=self._byte_L, target=operation.plan
            )
        except ValueError as error:
            raise RefusedError(str(error)) from None

    def _moved(self) -> None:
        """Whatever can happen now happens, and everybody may see it."""
        if self.repair is not None and set(self.repair.found) >= set(self.expected()):
            self._resume({number: self.repair.found[number] for number in self.expected()})
        living = {member.number for member in self.roster.living()}
        if self.course is not None and self.repair is None and self.course.done(living):
            self._finish(self.course.change)
        if self.course is None and self.repair is None and not self.settling and not self.lost:
            self._start()
        self.version += 1

    def _start(self) -> None:
        """The first of what is left to do: a target is absolute, so what has been done need not be remembered."""
        if (operation := self.operations.open) is None or self.epoch is None:
            return
        try:
            stages = self._way(operation)
        except RefusedError as error:  # it had to wait, and what came is not what was thought of
            operation.close(ABORTED, str(error))
            return
        if not stages:
            return
        operation.state, operation.reason = RUNNING, ""
        members, plan, transfers = stages[0]
        if members == self.epoch.members and not transfers and same_homes(plan, self.epoch.plan):
            operation.close(DONE)
            return
        new = Epoch(number=self._next(), members=members, plan=plan)
        self.course = Course(Change(old=self.epoch, new=new, transfer_N=transfers))

    def _flip(self, course: Course) -> None:
        course.flipped, self.epoch = True, course.change.new
        for member in self.roster.living(self.epoch.members):
            member.state = State.SERVING

    def _finish(self, change: Change) -> None:
        for member in self.roster.living(change.leavers):
            member.state = State.RELEASED
        if not change.new.members:
            for number in self.roster.numbers(State.STANDBY):
                self.roster.members[number].state = State.RELEASED
        self.course = None

    def _abort(self, reason: str) -> None:
        if self.operations.open is not None:
            self.operations.open.close(ABORTED, reason)
        self.course = None

    def _die(self, now: float, member: Member, reason: str) -> None:
        if member.state == State.DEAD:
            return
        told = f"member {member.number} {reason}"
        served = member.state == State.SERVING
        member.state, member.reason = State.DEAD, reason
        self._founding.pop(member.number, None)
        course = self.course
        coming = course is not None and not course.flipped and member.number in course.change.joiners
        going = course is not None and course.flipped and member.number in course.change.leavers
        if coming and course is not None and not course.go and self.repair is None:
            self._abort(told)
        elif self.repair is None and (coming or (served and not going)):
            self.repair = self._repair(now, told)

    def _repair(self, now: float, reason: str) -> Repair:
        return Repair(until=now + self.roster.lease + self.report, reason=reason, found={})

    def expected(self) -> list[int]:
        """Who has to report: all that take part in a change, or serve, and live."""
        if self.epoch is None:
            return []
        among = self.epoch.members if self.course is None else self.course.change.union
        return [member.number for member in self.roster.living(among)]

    def _resume(self, found: Mapping[int, Inventory]) -> None:
        """All that live have reported."""
        assert self.epoch is not None
        assert self.repair is not None
        serving = [member.number for member in self.roster.living(self.epoch.members)]
        taking_part = () if self.course is None else self.course.change.union
        reason, self.repair = self.repair.reason, None
        self.mark, found = common(self.epoch, found)
        try:
            epoch, self.restores = recovered(self.epoch, self._next(), serving, found)
        except ExpertsLostError as error:
            self.lost = error.lost_L
            self._abort(f"{reason}; experts were lost")
            return
        for member in self.roster.living(taking_part):
            if member.number in epoch.members:
                member.state = State.SERVING
            elif member.state == State.SERVING:  # it was to leave, or came after the step that all go back to
                member.state = State.STANDBY if member.number in serving else State.RELEASED
        self.epoch, self.settling = epoch, set(epoch.members)
        self._abort(reason)

    def _next(self) -> int:
        self.numbers += 1
        return self.numbers

    @property
    def phase(self) -> Phase:
        if self.lost:
            return Phase.LOST
        if self.repair is not None or self.settling:
            return Phase.RECOVER
        if self.course is not None:
            return self.course.phase
        return Phase.WAIT if self.operations.open else Phase.IDLE
