"""Members that die while they train: the others go back together, and the run is the one in which nobody died."""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from moe import checkpoint
from moe.comm import Peers
from placement import Plan
from tests.moe.live.member import even
from tests.moe.live.service import CONTEXT, Service
from tests.moe.live.trainee import CROSSINGS, PLACES, Death, Net, Part, Told, learn, optimizer_of, state_of, train

GROW = {"source": 1, "bystander": 3, "joiner": 4}  # 3 -> 4 members: experts go from 1 and 2 to 4
SHRINK = {"leaver": 4, "destination": 1, "bystander": 3}  # 4 -> 3 members: experts go from 4 to 1 and 2
STEPS = [(place, every) for place in PLACES for every in (1, 3)]
CHANGES = [
    (way, role, place, every)
    for way, roles in (("grow", GROW), ("shrink", SHRINK))
    for role, place, every in product(roles, CROSSINGS, (1, 3))
    if (role, place) != ("leaver", "next backup")  # it has left by then
]
SOME = set(random.Random(0).sample(CHANGES, 3))


class School(Service):
    """A service whose members train."""

    def __init__(self, founders: int, **part: Any) -> None:
        super().__init__(0, start=False)
        self.lesson = part
        for _ in range(founders):
            self.enrol(even(8, founders))
        self.hear(founders)

    def enrol(self, plan: Plan | None = None) -> None:
        ours, theirs = CONTEXT.Pipe()
        part = Part(address=self.address, plan=plan, **self.lesson)
        process = CONTEXT.Process(target=train, args=(part, theirs), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        self.pipes.append(ours)

    def mourn(self, victim: int) -> None:
        """Until it is dead, and the others go on."""
        self.until(lambda: victim in [m["member"] for m in self.status()["all"] if m["state"] == "dead"])
        self.until(lambda: self.status()["phase"] == "IDLE")
        self.steps(3)


def assert_as_if_nobody_had_died(told: dict[int, Told], *, luck: bool = False) -> None:
    """Every state that any member ever had after a step; and in the end nothing is missing."""
    assert not [member.error for member in told.values() if member.error]
    net = Net()
    optimizer = optimizer_of(net)
    torch.manual_seed(1)
    for step in range(1, max(max(member.states, default=0) for member in told.values()) + 1):
        learn(net, optimizer, step - 1, 0, 1, luck)
        whole = state_of(net, optimizer, luck)
        for member in told.values():
            for key, value in member.states.get(step, {}).items():
                assert np.array_equal(value, whole[key]), (member.member, step, key)
    last = [member.states[step] for member in told.values() if step in member.states]
    assert {key for state in last for key in state} == whole.keys()


def test_a_run_that_lost_three_of_four_members_is_the_one_that_lost_none_to_the_bit() -> None:
    """Weights, moments, counts of steps, learning rate, statistics and random numbers, after every step."""
    deaths = (
        Death(member=2, step=4, place="backward"),
        Death(member=1, step=9, place="after the optimiser"),
        Death(member=4, step=14, place="backup"),
    )
    with School(4, deaths=deaths, every=2, luck=True) as school:
        for death in deaths:
            school.mourn(death.member)
        told = school.end()
    assert told.keys() == {3}
    assert told[3].retries == 3
    assert_as_if_nobody_had_died(told, luck=True)


@pytest.mark.chaos
@pytest.mark.parametrize("place, every", STEPS)
def test_wherever_in_a_step_a_member_dies_the_others_do_it_again(place: str, every: int) -> None:
    with School(3, deaths=(Death(member=2, step=3, place=place),), every=every, luck=True) as school:
        school.mourn(2)
        told = school.end()
    assert told.keys() == {1, 3}
    assert_as_if_nobody_had_died(told, luck=True)


@pytest.mark.parametrize(
    "way, role, place, every",
    [pytest.param(*case, marks=[] if case in SOME else [pytest.mark.chaos]) for case in CHANGES],
)
def test_whoever_dies_while_experts_cross_the_others_go_on_from_before_or_after(
    way: str, role: str, place: str, every: int
) -> None:
    """And the next change is done."""
    victim = (GROW if way == "grow" else SHRINK)[role]
    with School(3 if way == "grow" else 4, deaths=(Death(member=victim, place=place),), every=every) as school:
        if way == "grow":
            school.enrol()
            school.hear(4)
        school.steps(2)
        school.scale(4 if way == "grow" else 3)
        school.mourn(victim)
        if not (way == "shrink" and role == "leaver"):
            school.scale(2)
            school.settle()
            school.steps(3)
        told = school.end()
    assert victim not in told
    assert_as_if_nobody_had_died(told)


def test_without_backups_the_experts_that_died_are_named() -> None:
    with School(3, deaths=(Death(member=2, step=3, place="forward"),), backup=False) as school:
        told = school.gather_errors(2)
    for member in told.values():
        assert "ExpertsLostError" in member.error
        assert "layer 0: [3, 4, 5]; layer 1: [3, 4, 5]" in member.error


def test_without_backups_all_go_back_to_a_checkpoint_that_they_can_read(tmp_path: Path) -> None:
    net = Net()
    optimizer = optimizer_of(net)
    for step in range(2):
        learn(net, optimizer, step, 0, 1, luck=False)
    checkpoint.save(tmp_path / "two", net, optimizer)
    death = Death(member=2, step=5, place="backward")
    with School(3, deaths=(death,), backup=False, resume=partial(resume, tmp_path / "two")) as school:
        school.mourn(2)
        told = school.end()
    assert_as_if_nobody_had_died(told)


def resume(folder: Path, model: nn.Module, optimizer: Optimizer, peers: Peers) -> int:
    checkpoint.load(folder, model, optimizer, group=peers)
    return 2
