"""After a death: experts stay where they are, and what is lost has a name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.epoch import Epoch
from moe.recovery import BACKUP, CHECKPOINT, ExpertsLostError, Inventory, recovered
from tests.moe.test_epoch import epochs

pytestmark = pytest.mark.fast


@st.composite
def deaths(draw: st.DrawFn) -> tuple[Epoch, list[int], dict[int, Inventory]]:
    """Some members live, and hold what the table says and more; strangers to the epoch too may hold something."""
    epoch = draw(epochs())
    assert epoch.plan is not None
    alive = [member for member in epoch.members if draw(st.booleans())] or [epoch.members[0]]
    sizes = [placement.num_experts for placement in epoch.plan.placement_L]
    found = {}
    for member in [*alive, *draw(st.lists(st.integers(61, 70), max_size=2, unique=True))]:
        more = [draw(st.sets(st.integers(0, size - 1), max_size=3)) for size in sizes]
        kept = [draw(st.sets(st.integers(0, size - 1), max_size=3)) for size in sizes]
        held = tuple(tuple(sorted({*epoch.experts_of(member, n), *extra})) for n, extra in enumerate(more))
        backup = tuple(tuple(sorted(each)) for each in kept)
        found[member] = Inventory(held_L=held, backup_L=backup, reads=draw(st.integers(0, 9)) == 0)
    return epoch, alive, found


@settings(deadline=None)
@given(deaths())
def test_every_expert_is_with_a_member_that_has_it_or_is_told_to_restore_it_or_is_named_as_lost(
    death: tuple[Epoch, list[int], dict[int, Inventory]],
) -> None:
    epoch, alive, found = death
    assert epoch.plan is not None
    lost: ExpertsLostError | None = None
    try:
        after, restores = recovered(epoch, 100, alive, found)
    except ExpertsLostError as error:
        lost = error
    if lost is not None:
        assert not any(found[member].reads for member in alive)
        for layer, experts in lost.lost_L.items():
            for expert in experts:
                assert not any(expert in inventory.held_L[layer] for inventory in found.values())
                assert not any(expert in found[member].backup_L[layer] for member in alive)
                assert str(expert) in str(lost)
        return
    assert after.number == 100
    assert set(alive) <= set(after.members) <= set(found)
    for layer, placement in enumerate(epoch.plan.placement_L):
        placed = {expert for member in after.members for expert in after.experts_of(member, layer)}
        assert placed == set(range(placement.num_experts))
        for member in after.members:
            for expert in after.experts_of(member, layer):
                asked = [r for r in restores if (r.layer, r.expert, r.member) == (layer, expert, member)]
                assert (expert in found[member].held_L[layer]) != bool(asked)
                for restore in asked:
                    kept = expert in found[member].backup_L[layer]
                    assert restore.source == (BACKUP if kept else CHECKPOINT)


@settings(deadline=None)
@given(deaths())
def test_who_serves_keeps_what_the_table_gave_it(death: tuple[Epoch, list[int], dict[int, Inventory]]) -> None:
    epoch, alive, found = death
    try:
        after, _ = recovered(epoch, 100, alive, found)
    except ExpertsLostError:
        return
    assert epoch.plan is not None
    for layer in range(len(epoch.plan.placement_L)):
        for member in alive:
            assert set(epoch.experts_of(member, layer)) <= set(after.experts_of(member, layer))
