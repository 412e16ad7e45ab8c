"""Members that are killed or stopped at every phase of a change: the others finish, and no answer is wrong."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from moe.course import Phase
from tests.moe.live.member import Fault, Told
from tests.moe.live.service import Service

PHASES = [Phase.PREPARE, Phase.COPY, Phase.READY, Phase.FLIP, Phase.FREE]
GROW = {"source": 1, "bystander": 3, "joiner": 4}  # 3 -> 4 members: experts go from 1 and 2 to 4
SHRINK = {"leaver": 4, "destination": 1, "bystander": 3}  # 4 -> 3 members: experts go from 4 to 1 and 2
CASES = [
    (way, role, phase, how)
    for way, roles in (("grow", GROW), ("shrink", SHRINK))
    for role in roles
    for phase in PHASES
    for how in (signal.SIGKILL, signal.SIGSTOP)
    if (role, phase) != ("leaver", Phase.FREE)  # it has left by then
]
LEASE = 6.0  # on a machine that does much else
SOME = set(random.Random(0).sample(CASES, 6))


def cases() -> list[object]:
    """A few for every push, the others for `make chaos`."""
    listed: list[object] = []
    for way, role, phase, how in CASES:
        marks = [] if (way, role, phase, how) in SOME else [pytest.mark.chaos]
        listed.append(pytest.param(way, role, phase, how, id=f"{way}-{role}-{phase.name}-{how.name}", marks=marks))
    return listed


@pytest.mark.parametrize("way, role, phase, how", cases())
def test_the_others_finish_whoever_fails_and_whenever(
    way: str, role: str, phase: Phase, how: signal.Signals, tmp_path: Path
) -> None:
    """And no request is lost or answered twice; the one that the victim was at may be asked again of another."""
    log = tmp_path / "answered"
    victim = (GROW if way == "grow" else SHRINK)[role]
    fault = Fault(member=victim, phase=phase, signal=how)
    lease = LEASE if how == signal.SIGSTOP else 20.0
    with Service(3 if way == "grow" else 4, experts=8, lease=lease, reads=True, fault=fault, log=str(log)) as service:
        if way == "grow":
            service.join()
        service.scale(4 if way == "grow" else 3)
        service.until(lambda: victim in service.status()["safe_to_terminate"])  # dead, or it had left by then
        service.until(lambda: service.status()["phase"] == "IDLE")
        service.kill(victim)
        service.steps(3)
        before = service.status()
        more = len(before["members"]) + 1
        if len(before["standby"]) == 0:
            service.join(fault=None)
        service.scale(more)
        service.settle()
        service.steps(3)
        told = service.end()
    assert_unharmed(told, victim)
    answered = Counter(tuple(map(int, line.split())) for line in log.read_text().splitlines())
    assert set(answered.values()) == {1}
    for member in {member for member, _ in answered}:
        numbers = sorted(number for who, number in answered if who == member)
        assert numbers == list(range(len(numbers)))
        assert member == victim or numbers == told[member].served
    early = role == "joiner" and phase < Phase.READY
    assert max(member.retries for member in told.values()) <= (0 if early else 1)


def assert_unharmed(told: dict[int, Told], *victims: int) -> None:
    assert not told.keys() & set(victims)
    for member in told.values():
        assert (member.wrong, member.error) == (0, "")
        assert member.served == list(range(len(member.served)))
        assert member.epochs == sorted(set(member.epochs))


def test_a_lost_expert_that_nobody_can_restore_is_an_error_that_names_it() -> None:
    """Tokens are never routed to zeros: those who live on stop."""
    fault = Fault(member=2, phase=Phase.PREPARE)
    with Service(3, experts=8, fault=fault) as service:
        service.join()
        service.scale(4)
        service.until(lambda: service.status()["phase"] == "LOST")
        told = service.gather_errors(2)
    for member in told.values():
        assert "ExpertsLostError" in member.error
        assert "layer 0: [3, 4, 5]; layer 1: [3, 4, 5]" in member.error
        assert member.wrong == 0


@pytest.mark.parametrize("phase", [Phase.PREPARE, pytest.param(Phase.FREE, marks=pytest.mark.chaos)])
def test_a_lost_expert_comes_from_its_backup_on_another_member(phase: Phase) -> None:
    """Twice in a row: the backups are made anew after a death."""
    fault = Fault(member=2, phase=phase)
    with Service(3, experts=8, backup=True, fault=fault) as service:
        service.join()
        service.backed_up()
        service.scale(4)
        service.until(lambda: 2 in service.status()["safe_to_terminate"] and service.status()["phase"] == "IDLE")
        service.steps(3)
        service.backed_up()
        service.kill(3)
        service.until(lambda: 3 in service.status()["safe_to_terminate"] and service.status()["phase"] == "IDLE")
        service.steps(3)
        told = service.end()
    assert_unharmed(told, 2, 3)


@pytest.mark.parametrize("restart", [False, True], ids=["", "by-another-coordinator"])
def test_who_was_given_up_for_dead_is_refused_when_it_comes_back(restart: bool) -> None:
    """Nobody kills it: it is another machine's. Its peers time out, go on without it, and refuse it."""
    fault = Fault(member=2, phase=Phase.READY, signal=signal.SIGSTOP)
    with Service(3, experts=8, lease=LEASE, fences=False, reads=True, timeout=8.0, fault=fault) as service:
        service.join()
        service.scale(4)
        service.until(lambda: 2 in [m["member"] for m in service.status()["all"] if m["state"] == "dead"])
        service.until(lambda: service.status()["phase"] == "IDLE")
        service.steps(3)
        if restart:
            service.restart_coordinator()
            service.until(lambda: service.status()["phase"] == "IDLE" and service.status()["epoch"])
        service.wake(2)
        service.until(lambda: service.heard(2))
        told = service.end()
    assert "FencedError" in told[2].error
    assert told[2].wrong == 0
    assert_unharmed({number: member for number, member in told.items() if number != 2})
