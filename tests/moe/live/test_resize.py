"""Members come and go while the model serves: nobody is started again, and every answer is the static model's."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from moe.course import Phase
from moe.epoch import same_homes
from placement import Placement, Plan
from tests.moe.live.member import Fault
from tests.moe.live.service import Service


def test_a_service_grows_and_shrinks_and_every_answer_is_that_of_the_static_model() -> None:
    """2 -> 4 -> 3 -> 5 -> 1; every number of every answer, to the bit."""
    with Service(2, experts=8) as service:
        first = dict(service.pid_of)
        service.join(2)
        service.scale(4)
        assert len(service.settle()["members"]) == 4
        service.scale(3)
        assert len(service.settle()["members"]) == 3
        running = Plan.from_json(service.ask("plan")["plan"])
        turned = tuple(Placement(expert_RS=np.roll(p.expert_RS, 1, axis=0)) for p in running.placement_L)
        service.ask("place", op="turn", plan=Plan(placement_L=turned).to_json())
        service.settle()
        assert same_homes(Plan.from_json(service.ask("plan")["plan"]), Plan(placement_L=turned))
        service.join(2)
        service.scale(5)
        service.settle()
        service.scale(1)
        assert service.settle()["members"] == [1]
        service.steps(5)
        told = service.end()
    assert service.pid_of.items() >= first.items()
    for member in told.values():
        assert member.pid == service.pid_of[member.member]
        assert (member.wrong, member.error, member.retries) == (0, "", 0)
        assert member.served == list(range(len(member.served)))
        assert member.epochs == sorted(set(member.epochs))
    assert len(told) == 6


def test_what_came_for_a_change_that_was_called_off_is_let_go_and_the_next_change_is_done() -> None:
    """Backups are there as before: they are of the epoch that goes on."""
    fault = Fault(member=4, phase=Phase.COPY, signal=signal.SIGSTOP)  # it leaves, and has sent one expert
    with Service(4, experts=8, backup=True, fault=fault) as service:
        service.backed_up()
        service.scale(3)
        stat = Path(f"/proc/{service.pid_of[4]}/stat")
        service.until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        service.ask("cancel", op="scale-1")
        service.wake(4)
        service.steps(3)
        service.backed_up()
        service.scale(3)
        service.settle()
        service.steps(3)
        service.backed_up()
        told = service.end()
    assert {(member.wrong, member.retries, member.error, member.salvaged) for member in told.values()} == {
        (0, 0, "", 0)
    }


@pytest.mark.parametrize("cycles", [8, pytest.param(100, marks=pytest.mark.chaos)])
def test_resizing_over_and_over_leaves_nothing_behind(cycles: int) -> None:
    """File descriptors, threads and memory of who stays are what they were."""
    with Service(2, experts=6) as service:
        service.join(lives=cycles)
        for cycle in range(cycles):
            service.hear(3 + cycle)
            service.scale(3)
            service.settle()
            service.steps(2)
            service.scale(2)
            service.settle()
        told = service.end()
    for member in (1, 2):
        assert (told[member].wrong, told[member].retries, told[member].error) == (0, 0, "")
        epochs = told[member].epochs
        assert len(epochs) == 2 * cycles + 1
        assert epochs == sorted(set(epochs))
        descriptors, threads, resident = zip(*told[member].resources[4::2])
        assert max(descriptors) <= descriptors[0] + 4, descriptors
        assert max(threads) <= threads[0] + 3, threads
        assert resident[-1] <= resident[0] * 1.05 + 2000, resident
