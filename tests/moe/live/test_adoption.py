"""A coordinator started anew, in the middle of a recovery: it asks who was to report, and waits for who was to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from moe.adoption import Adoption
from moe.coordinator import Coordinator
from moe.course import Phase
from moe.recovery import Inventory
from moe.view import status, view
from tests.moe.live.test_coordinator import founded

pytestmark = pytest.mark.fast


def has(*experts: int, reads: bool = False) -> Inventory:
    return Inventory(held_L=(experts,) * 2, backup_L=((), ()), reads=reads)


def adopted(before: Coordinator, said: Mapping[int, Sequence[tuple[int, Phase]]]) -> Coordinator:
    """By another, with the members that come back. said: by each of them, phases of epochs."""
    after, adoption = Coordinator(lease=1.0, report=1.0), Adoption(0.0, "")
    for member, phases in said.items():
        told = [{"do": "reached", "epoch": epoch, "phase": int(phase)} for epoch, phase in phases]
        adoption.hear(member, view(before), told)
    adoption.into(after, 0.0)
    for member, phases in said.items():
        for epoch, phase in phases:
            after.reached(0.0, member, epoch, phase)
    return after


@pytest.mark.parametrize("seen", [True, False], ids=["death seen", "death unseen"])
@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.READY])
def test_a_newcomer_is_asked_by_the_next_coordinator_what_it_has_and_saves_the_service(
    phase: Phase, seen: bool
) -> None:
    """Who serves notices a death in its next step, whoever asks; where all of them are dead nobody does."""
    before = founded(1)
    before.hello(0.0, plan=None)
    before.scale(0.0, "a", 2)
    for member, done in ((1, Phase.PREPARE), (2, Phase.PREPARE), (2, phase)):
        before.reached(0.0, member, 2, done)
    if seen:
        before.gone(0.0, 1)
        assert view(before)["report"] == [2]
    after = adopted(before, {2: [(2, Phase.PREPARE), (2, phase)]})
    if not seen:
        after.gone(0.0, 1)
    assert view(after)["report"] == [2]
    after.broken(0.0, 2, 2, has(0, 1, 2, reads=True))
    assert not after.lost
    assert status(after)["members"] == [2]


def test_a_change_that_nobody_heard_had_met_for_is_begun_again_though_a_member_is_late() -> None:
    """Nobody has anything of it, and the place where they were to meet is no more."""
    before = founded(2)
    before.hello(0.0, plan=None)
    before.scale(0.0, "a", 3)
    after = adopted(before, {2: [], 3: []})
    assert after.course is not None
    assert after.course.change.new.number == 3
    after.beat(0.5, 1)
    after.tick(0.6)
    for phase in (Phase.PREPARE, Phase.COPY, Phase.READY):
        for member in (1, 2, 3):
            after.reached(0.7, member, 3, phase)
    after.failed(0.8, 2, 2, "the meeting place of the old change is gone")
    assert status(after)["phase"] != "SERVE"
    assert after.operations.last is not None
    assert after.operations.last.state == "running"


def test_who_does_not_report_to_the_next_coordinator_either_is_dead() -> None:
    """It beats, but its steps hang. It has the same time as ever, from when it was asked again."""
    before = founded(3)
    before.gone(0.0, 3)
    after = adopted(before, {1: [], 2: []})
    after.broken(1.9, 1, 1, has(*range(6)))
    after.beat(1.9, 2)
    after.tick(1.9)
    assert status(after)["phase"] == "RECOVER"
    after.tick(2.1)
    assert status(after)["members"] == [1]
    assert after.roster.members[2].reason == "did not report after a failure"


def test_a_request_made_in_a_recovery_waits_for_everybody_to_step_under_the_next_coordinator_too() -> None:
    """Begun sooner, it would fail once those who are ready have waited a time-out for those who still restore."""
    before = founded(3)
    before.gone(0.0, 3)
    for member in (1, 2):
        before.broken(0.0, member, 1, has(*range(6)))
    before.scale(0.0, "a", 1)
    before.reached(0.0, 1, 2, Phase.FREE)
    assert status(before)["phase"] == "RECOVER"
    after = adopted(before, {1: [(2, Phase.FREE)], 2: []})
    assert status(after)["phase"] == "RECOVER"
    assert after.course is None
    after.reached(0.0, 2, 2, Phase.FREE)
    assert after.course is not None
    assert after.course.change.new.members == (1,)
