"""What a coordinator tells: members a view, the same for each, and operators a status."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe.coordinator import Coordinator
from moe.roster import LEFT, RefusedError, State


def view(coordinator: Coordinator) -> dict[str, Any]:
    """All that members need to know, and what they keep for a coordinator that is started anew. report: who is to say
    what it has, after a failure. mark: the generation of backups that all go back to, in training."""
    course, roster = coordinator.course, coordinator.roster
    return {
        "service": coordinator.service,
        "version": coordinator.version,
        "epoch": None if coordinator.epoch is None else coordinator.epoch.fields(),
        "change": None if course is None else course.change.fields(),
        "go": course is not None and course.go,
        "report": [] if coordinator.repair is None else coordinator.expected(),
        "restores": [asdict(restore) for restore in coordinator.restores],
        "mark": coordinator.mark,
        "released": roster.numbers(State.RELEASED),
        "dead": [m.number for m in roster.members.values() if m.state == State.DEAD and m.reason != LEFT],
        "lost": _lost(coordinator),
        "living": {str(m.number): {"process": m.process, "slots": m.slots} for m in roster.living()},
        "count": roster.count,
        "numbers": coordinator.numbers,
        "portion": coordinator.portion,
        "settling": sorted(coordinator.settling),
        "operations": coordinator.operations.kept,
    }


def status(coordinator: Coordinator) -> dict[str, Any]:
    """For operators: `safe_to_terminate` are members whose end costs nothing."""
    epoch, roster, last = coordinator.epoch, coordinator.roster, coordinator.operations.last
    change = None if coordinator.course is None else coordinator.course.change
    part = () if change is None else change.union
    idle = [number for number in roster.numbers(State.STANDBY) if number not in part]
    return {
        "epoch": None if epoch is None else epoch.number,
        "members": [] if epoch is None else list(epoch.members),
        "phase": coordinator.phase.name,
        "change": None if change is None else {"epoch": change.new.number, "members": list(change.new.members)},
        "operation": None if last is None else last.fields(),
        "standby": roster.numbers(State.STANDBY),
        "safe_to_terminate": sorted(idle + roster.numbers(State.RELEASED) + roster.numbers(State.DEAD)),
        "lost": _lost(coordinator),
        "all": [member.fields() for member in roster.members.values()],
    }


def running(coordinator: Coordinator) -> dict[str, Any]:
    """Where experts live, as a plan whose ranks are the members."""
    if coordinator.epoch is None or coordinator.epoch.plan is None:
        raise RefusedError("nobody serves")
    return {"members": list(coordinator.epoch.members), "plan": coordinator.epoch.plan.to_json()}


def _lost(coordinator: Coordinator) -> dict[str, list[int]]:
    return {str(layer): list(experts) for layer, experts in coordinator.lost.items()}
