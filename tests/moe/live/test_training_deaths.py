"""Members that die while they train: the others go back together, and the run is the one in which nobody died."""

from __future__ import annotations

from itertools import product

import numpy as np

from tests.moe.live.member import even
from tests.moe.live.service import CONTEXT, Service
from tests.moe.live.trainee import PLACES, Death, Net, Part, Told, learn, optimizer_of, state_of, train

CASES = list(product(PLACES, (1, 3)))


class School(Service):
    """A service whose members train."""

    def __init__(self, founders: int, **part: object) -> None:
        super().__init__(0, start=False)
        self.lesson = part
        for _ in range(founders):
            self.enrol(even(8, founders))
        self.hear(founders)

    def enrol(self, plan: object = None) -> None:
        ours, theirs = CONTEXT.Pipe()
        part = Part(address=self.address, plan=plan, **self.lesson)  # type: ignore[arg-type]
        process = CONTEXT.Process(target=train, args=(part, theirs), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        self.pipes.append(ours)


def assert_as_if_nobody_had_died(told: dict[int, Told], *, luck: bool) -> None:
    """Every state that any member ever had after a step; and in the end nothing is missing."""
    assert not [member.error for member in told.values() if member.error]
    net = Net()
    optimizer = optimizer_of(net)
    import torch

    torch.manual_seed(1)
    for step in range(1, max(max(member.states) for member in told.values()) + 1):
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
        Death(member=1, step=8, place="after the optimiser"),
        Death(member=4, step=12, place="backup"),
    )
    with School(4, deaths=deaths, every=2, luck=True) as school:
        school.until(lambda: len(school.rest(1)["members"]) == 1)
        school.steps(2)
        told = school.end()
    assert told.keys() == {3}
    assert_as_if_nobody_had_died(told, luck=True)
