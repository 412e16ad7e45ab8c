"""The coordinator, by the thousand: members come, go and die in any order and at any point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.adoption import Adoption
from moe.coordinator import Coordinator
from moe.course import Phase
from moe.epoch import same_homes
from moe.recovery import Inventory
from moe.roster import FencedError, RefusedError
from moe.view import status, view
from placement import Placement, Plan
from tests.moe.live.member import even
from tests.moe.live.world import SimWorld

pytestmark = pytest.mark.fast

EVENTS = st.one_of(
    st.tuples(st.just("join"), st.just(0)),
    st.tuples(st.just("scale"), st.integers(1, 6)),
    st.tuples(st.just("advance"), st.integers(0, 9)),
    st.tuples(st.just("advance"), st.integers(0, 9)),
    st.tuples(st.just("advance"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("kill"), st.integers(0, 9)),
    st.tuples(st.just("tear"), st.integers(1, 3)),
    st.tuples(st.just("crash"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
)


def play(world: SimWorld, events: list[tuple[str, int]]) -> None:
    for what, number in events:
        match what:
            case "join":
                world.join()
            case "scale":
                world.scale(number)
            case "advance":
                world.advance(number)
            case "step":
                world.step()
            case "kill":
                world.kill(number)
            case "tear":
                world.kill(number)
                world.step(torn=number)
            case "crash":
                world.crash()
            case "restart":
                world.restart()
    world.restart()


def calm(world: SimWorld) -> None:
    """Everybody does all it can, and nobody dies."""
    for _ in range(12):
        for turn in range(len(world.members)):
            world.advance(turn)
        world.step()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.lists(EVENTS, max_size=40))
def test_whatever_happens_the_survivors_serve_again_with_every_expert(
    founders: int, events: list[tuple[str, int]]
) -> None:
    """I1: whoever gets rows holds the expert, at every step. I6: numbers only grow. And there is no deadlock."""
    world = SimWorld(founders, reads=True)
    play(world, events)
    calm(world)
    assert world.seen_epochs == sorted(world.seen_epochs)
    if not any(member in world.members for member in world.epoch.members):
        return  # everybody who served is dead
    assert world.coordinator.phase in (Phase.IDLE, Phase.WAIT)
    if world.coordinator.operations.open is not None:
        for _ in range(6):
            world.join()
        calm(world)
    assert world.coordinator.phase == Phase.IDLE
    world.scale(1)
    calm(world)
    assert world.coordinator.phase == Phase.IDLE
    assert len(world.epoch.members) == 1


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 4), st.lists(EVENTS, max_size=40))
def test_without_a_checkpoint_it_serves_with_every_expert_or_names_those_lost(
    founders: int, events: list[tuple[str, int]]
) -> None:
    world = SimWorld(founders, reads=False)
    play(world, events)
    calm(world)
    if world.coordinator.phase == Phase.LOST:
        held = {cell for sim in world.members.values() for cell in sim.held}
        assert all((layer, e) not in held for layer, experts in world.coordinator.lost.items() for e in experts)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.lists(EVENTS.filter(lambda event: event[0] not in ("kill", "tear")), max_size=40))
def test_where_nobody_dies_no_step_is_done_again(founders: int, events: list[tuple[str, int]]) -> None:
    world = SimWorld(founders, reads=False)
    play(world, events)
    calm(world)
    assert world.retries == 0


ROUNDS: list[tuple[str, int]] = [("advance", 0), ("advance", 1), ("advance", 2), ("step", 0)] * 4


@pytest.mark.parametrize("before, after", [(2, 3), (3, 2)])
def test_a_change_is_finished_whenever_the_coordinator_ends_and_another_takes_its_place(
    before: int, after: int
) -> None:
    """And no step is done again; nothing is forgotten that was asked for and seen, or that is over."""
    for crash in range(len(ROUNDS) + 1):
        for restart in range(crash, len(ROUNDS) + 1):
            world = SimWorld(before, reads=False)
            for _ in range(after - before):
                world.join()
                world.advance(before)
            world.scale(after)
            events = list(ROUNDS)
            events.insert(restart, ("restart", 0))
            events.insert(crash, ("crash", 0))
            play(world, events)
            calm(world)
            assert world.retries == 0
            assert world.coordinator.phase == Phase.IDLE
            assert world.seen_epochs == sorted(world.seen_epochs)
            assert world.numbers == sorted(set(world.numbers)), (crash, restart)
            if crash:  # somebody saw what was asked for
                assert len(world.epoch.members) == after, (crash, restart)
                assert world.coordinator.scale(0.0, "op-1", after)["state"] == "done"
            world.join()
            assert len(world.members) == max(before, after) + 1
            world.scale(1)
            calm(world)
            assert len(world.epoch.members) == 1


def test_a_plan_is_carried_out_by_whichever_coordinator_and_asked_for_once() -> None:
    """A rank of it is a member; where only copies are given up, nothing travels."""
    copies = Plan(placement_L=(Placement(expert_RS=np.array([[0, 1, 2, 3], [3, 4, 5, 0]])),) * 2)
    fewer = Plan(placement_L=(Placement(expert_RS=np.array([[0, 1, 2, -1], [3, 4, 5, -1]])),) * 2)
    for crash in range(12):
        world = SimWorld(2, reads=False)
        for number, plan in enumerate((copies, fewer)):
            world.coordinator.place(0.0, f"plan {number}", plan)
            events = [("advance", 0), ("advance", 1), ("step", 0)] * 4
            play(world, [*events[: crash + 1], ("crash", 0), ("step", 0), ("restart", 0)])
            calm(world)
            assert same_homes(world.epoch.plan, plan), (crash, number)
            assert world.coordinator.place(0.0, f"plan {number}", plan)["state"] == "done"
        assert world.retries == 0
    with pytest.raises(RefusedError, match="the plan is for 3 ranks; 2 members serve"):
        world.coordinator.place(0.0, "wide", even(6, 3))


def test_a_request_is_begun_again_though_nobody_says_anything_more() -> None:
    """All were meeting where nobody is any more."""
    before, after, adoption = founded(2), Coordinator(), Adoption(0.0, "")
    before.scale(0.0, "a", 1)
    for member in (1, 2):
        adoption.hear(member, view(before), [])
    adoption.into(after, 0.0)
    assert before.course is not None
    assert after.course is not None
    assert after.course.change.new.number == before.course.change.new.number + 1


def founded(members: int) -> Coordinator:
    coordinator = Coordinator(lease=1.0, report=1.0)
    for _ in range(members):
        coordinator.hello(0.0, plan=even(6, members))
    return coordinator


def test_a_request_is_done_once_however_often_it_is_made_and_two_are_not_mixed() -> None:
    coordinator = founded(2)
    coordinator.scale(0.0, "a", 3)
    assert coordinator.scale(0.0, "a", 3)["state"] == "pending"
    with pytest.raises(RefusedError, match=r"'a' is \{'scale': 3\}, not \{'scale': 4\}"):
        coordinator.scale(0.0, "a", 4)
    with pytest.raises(RefusedError, match="'a' is under way"):
        coordinator.drain(0.0, "b", [1])
    assert coordinator.cancel(0.0, "a")["state"] == "aborted"
    assert coordinator.scale(0.0, "a", 3)["state"] == "aborted"
    assert coordinator.drain(0.0, "b", [1])["state"] == "running"
    assert status(coordinator)["change"]["members"] == [2]


def test_what_cannot_be_is_refused_in_words() -> None:
    coordinator = founded(2)
    with pytest.raises(RefusedError, match=r"members \[7\] do not serve; those who do are \[1, 2\]"):
        coordinator.drain(0.0, "a", [7])
    with pytest.raises(RefusedError, match="nobody would be left"):
        coordinator.drain(0.0, "a", [1, 2])
    with pytest.raises(RefusedError, match="cannot scale to -1"):
        coordinator.scale(0.0, "a", -1)
    with pytest.raises(RefusedError, match="epoch 1 serves already"):
        coordinator.hello(0.0, plan=even(6, 2))
    with pytest.raises(RefusedError, match="nobody is member 9"):
        coordinator.beat(0.0, 9)


def test_founders_with_different_plans_are_told_apart() -> None:
    coordinator = Coordinator()
    coordinator.hello(0.0, plan=even(6, 2))
    with pytest.raises(RefusedError, match="another founder's"):
        coordinator.hello(0.0, plan=even(8, 2))


def test_who_is_silent_longer_than_a_lease_is_dead_and_stays_dead() -> None:
    coordinator = founded(2)
    coordinator.beat(0.9, 1)
    coordinator.tick(1.5)
    assert status(coordinator)["phase"] == "RECOVER"
    assert status(coordinator)["safe_to_terminate"] == [2]
    with pytest.raises(FencedError, match="member 2 was given up: was not heard of for 1 s"):
        coordinator.beat(1.6, 2)


def test_a_survivor_that_does_not_report_is_dead_too() -> None:
    """Its process beats, but its steps hang."""
    coordinator = founded(3)
    coordinator.gone(0.0, 3)
    coordinator.broken(0.1, 1, 1, Inventory(held_L=((0, 1, 2, 3, 4, 5),) * 2, backup_L=((), ()), reads=True))
    for now in (0.5, 1.0, 1.5, 2.1):
        coordinator.beat(now, 1)
        coordinator.beat(now, 2)
        coordinator.tick(now)
    assert status(coordinator)["members"] == [1]
    assert coordinator.roster.members[2].reason == "did not report after a failure"


def test_numbers_of_members_and_epochs_are_never_used_again() -> None:
    coordinator = founded(2)
    coordinator.gone(0.0, coordinator.hello(0.0, plan=None))
    assert coordinator.hello(0.0, plan=None) == 4
    coordinator.scale(0.0, "a", 3)
    first = status(coordinator)["change"]["epoch"]
    coordinator.cancel(0.0, "a")
    coordinator.scale(0.0, "b", 3)
    assert status(coordinator)["change"]["epoch"] == first + 1


def test_bytes_at_a_boundary_are_counted_once_members_know_what_an_expert_weighs() -> None:
    """That is after a step: before it the optimiser keeps nothing. Then a change takes as many epochs as it needs."""
    coordinator = Coordinator()
    for plan in (even(6, 2), even(6, 2), None):
        coordinator.hello(0.0, plan=plan, portion=1000)
    assert "what an expert weighs" in coordinator.scale(0.0, "a", 3)["reason"]
    assert coordinator.phase == Phase.WAIT
    coordinator.beat(0.0, 1, byte_L=(400, 0))  # it has no expert of the second layer
    assert coordinator.phase == Phase.WAIT
    coordinator.beat(0.0, 2, byte_L=(400, 600))
    assert coordinator.phase == Phase.PREPARE
    assert coordinator.course is not None
    moving = [(400, 600)[t.layer] for t in coordinator.course.change.transfer_N if t.destination == 3]
    assert moving
    assert sum(moving) <= 1000
    coordinator.cancel(0.0, "a")
    coordinator.beat(0.0, 2, byte_L=(400, 1200))
    with pytest.raises(RefusedError, match="an expert weighs 1200 bytes, more than the 1000"):
        coordinator.scale(0.0, "b", 3)
