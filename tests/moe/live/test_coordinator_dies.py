"""Without a coordinator nothing is resized, and no step waits; another one at its address goes on where it was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from moe.course import Phase
from moe.roster import RefusedError
from tests.moe.live.member import Fault
from tests.moe.live.service import Service
from tests.moe.live.test_death import PHASES, assert_unharmed

SOME = random.Random(1).choice(PHASES)
LEASE = 1.5


def grow(service: Service) -> None:
    """Who is to answer may be gone before it does."""
    with contextlib.suppress(OSError, RefusedError):
        service.ask("scale", op="grow", count=4, timeout=2.0)


def phases() -> list[object]:
    marks = {phase: [] if phase == SOME else [pytest.mark.chaos] for phase in PHASES}
    return [pytest.param(phase, id=phase.name, marks=marks[phase]) for phase in PHASES]


@pytest.mark.parametrize("phase", phases())
def test_steps_go_on_when_the_coordinator_is_killed(phase: Phase) -> None:
    """At any phase of a change, which then happens on all members or on none."""
    with Service(3, experts=8, start=False, timeout=8.0) as service:
        pid = service.coordinator.pid or 0
        service.found(3, fault=Fault(member=1, phase=phase, victim=pid), watch=pid)
        service.join(watch=pid)
        grow(service)
        service.until(lambda: all(service.heard(member) for member in (1, 2, 3)))
        told = {member: service.told[member] for member in (1, 2, 3)}
    assert_unharmed(told)
    assert {member.left for member in told.values()} == {0}
    assert {member.retries for member in told.values()} == {0}
    assert len({tuple(member.epochs) for member in told.values()}) == 1


@pytest.mark.parametrize("phase", phases())
def test_a_coordinator_that_was_stopped_gives_nobody_up_for_dead(phase: Phase) -> None:
    """Longer than a lease, in which it heard nobody; and then the change goes on."""
    with Service(3, experts=8, start=False, lease=LEASE) as service:
        pid = service.coordinator.pid or 0
        service.found(3, fault=Fault(member=1, phase=phase, victim=pid, signal=signal.SIGSTOP))
        service.join()
        grow(service)
        service.until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        time.sleep(LEASE + 0.5)
        os.kill(pid, signal.SIGCONT)
        assert len(service.settle()["members"]) == 4
        told = service.end()
    assert_unharmed(told)
    assert {member.retries for member in told.values()} == {0}


@pytest.mark.parametrize("phase", [Phase.IDLE, *PHASES], ids=lambda phase: str(phase.name))
def test_a_coordinator_started_anew_finishes_what_was_begun(phase: Phase, tmp_path: Path) -> None:
    """Steps go on meanwhile, none is done again, nobody is started again; and then it shrinks."""
    log = tmp_path / "answered"
    with Service(3, experts=8, start=False, timeout=8.0, log=str(log)) as service:
        pid = service.coordinator.pid or 0
        service.found(3, fault=None if phase == Phase.IDLE else Fault(member=1, phase=phase, victim=pid))
        service.join()
        if phase == Phase.IDLE:
            service.coordinator.kill()
        else:
            grow(service)
        service.lose_coordinator()
        answered = log.read_text().count("\n")
        service.until(lambda: log.read_text().count("\n") > answered + 6)
        service.restart_coordinator()
        service.until(lambda: service.status()["phase"] != "ADOPT" and service.status()["epoch"])
        service.ask("scale", op="grow", count=4)
        assert service.settle()["members"] == [1, 2, 3, 4]
        assert service.ask("scale", op="grow", count=4)["state"] == "done"
        service.steps(3)
        service.scale(2)
        assert service.settle()["members"] == [1, 2]
        service.steps(3)
        told = service.end()
    assert_unharmed(told)
    assert {member.retries for member in told.values()} == {0}
    assert {member.member: member.pid for member in told.values()} == service.pid_of


def test_who_died_together_with_the_coordinator_is_missed_by_the_next_one() -> None:
    with Service(3, experts=8, reads=True) as service:
        service.steps(2)
        service.coordinator.kill()
        service.kill(2)
        service.restart_coordinator()
        service.until(lambda: service.status()["members"] == [1, 3] and service.status()["phase"] == "IDLE")
        assert service.join() == [4]
        service.scale(3)
        assert service.settle()["members"] == [1, 3, 4]
        told = service.end()
    assert_unharmed(told, 2)
    assert max(member.retries for member in told.values()) == 1
