"""After a death: experts stay where they are, and what is lost has a name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.epoch import EMPTY, Epoch
from moe.recovery import BACKUP, CHECKPOINT, ExpertsLostError, Inventory, Mark, Saved, common, recovered
from placement import Placement, Plan
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


@st.composite
def backups(draw: st.DrawFn) -> tuple[Epoch, dict[int, Inventory]]:
    """Of two epochs; who lives has some generations whole, and in each the experts that its epoch gave it."""
    old = draw(epochs())
    assert old.plan is not None
    new = Epoch(number=old.number + 1, members=(*old.members, 60), plan=_with_one_more(old.plan))
    keeper_of = dict(zip(old.members, [*old.members[1:], old.members[0]]))
    marks = [(epoch, Mark(epoch.number, step)) for epoch, step in ((old, 3), (old, 4), (new, 4), (new, 5))]
    layers = range(len(old.plan.placement_L))
    found = {}
    for member in new.members:
        if not draw(st.booleans()):
            continue
        saved_N = []
        for epoch, mark in marks:
            if member in epoch.members and draw(st.integers(0, 3)):
                wards = [ward for ward, keeper in keeper_of.items() if keeper == member]
                held = tuple(epoch.experts_of(member, n) for n in layers)
                kept = tuple(tuple(e for ward in wards for e in epoch.experts_of(ward, n)) for n in layers)
                saved_N.append(Saved(mark=mark, members=epoch.members, held_L=held, backup_L=kept))
        found[member] = Inventory(held_L=held_now(new, member), backup_L=((),) * len(layers), reads=False,
                                  saved_N=tuple(saved_N))  # fmt: skip
    return new, found


def held_now(epoch: Epoch, member: int) -> tuple[tuple[int, ...], ...]:
    assert epoch.plan is not None
    return tuple(epoch.experts_of(member, n) for n in range(len(epoch.plan.placement_L)))


def _with_one_more(plan: Plan) -> Plan:
    """A rank without experts."""
    rows = [np.vstack([p.expert_RS, np.full(p.expert_RS.shape[1], EMPTY)]) for p in plan.placement_L]
    return Plan(placement_L=tuple(Placement(expert_RS=table) for table in rows), layer_L=plan.layer_L)


@settings(deadline=None)
@given(backups())
def test_all_go_back_to_the_newest_backup_that_nobody_who_made_it_lacks(
    backup: tuple[Epoch, dict[int, Inventory]],
) -> None:
    epoch, found = backup
    mark, then = common(epoch, found)
    saved_of = {m: {saved.mark: saved for saved in found[m].saved_N} for m in found}
    makers_of = {saved.mark: saved.members for m in found for saved in found[m].saved_N}
    whole = [each for each, makers in makers_of.items() if all(each in saved_of[m] for m in makers if m in found)]
    if mark is None:
        assert not whole
        assert then == found
        return
    assert mark in whole
    assert then.keys() == {m for m in makers_of[mark] if m in found}
    assert all(then[m].held_L == saved_of[m][mark].held_L for m in then)
    assert epoch.plan is not None
    for later in (each for each in whole if each > mark):
        present = [saved_of[m][later] for m in makers_of[later] if m in found]
        assert any(
            not set(range(p.num_experts)) <= {e for s in present for e in (*s.held_L[n], *s.backup_L[n])}
            for n, p in enumerate(epoch.plan.placement_L)
        )


@settings(deadline=None)
@given(backups())
def test_an_inventory_survives_its_json(backup: tuple[Epoch, dict[int, Inventory]]) -> None:
    for inventory in backup[1].values():
        assert Inventory.read(json.loads(json.dumps(inventory.fields()))) == inventory
