"""After a death: who serves from now on, and where each expert comes from. Decided from what is truly there.

Ranks may have seen the flip of an epoch or not, so no table is trusted: every survivor says what it holds, arrivals of
a change under way included, and what it keeps as a backup of others.

In training the survivors may be in different steps. There every member says which generations of backups it has whole,
and all go back to the newest of which nobody who made it, and lives, lacks its part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np

from moe.epoch import EMPTY, Epoch
from placement import Placement, Plan

BACKUP, CHECKPOINT = "backup", "checkpoint"


class ExpertsLostError(RuntimeError):
    """Experts of which no rank has a copy or a backup, and no checkpoint is there to be read."""

    def __init__(self, lost_L: Mapping[int, Sequence[int]]) -> None:
        self.lost_L = {int(layer): tuple(experts) for layer, experts in lost_L.items()}
        told = "; ".join(f"layer {layer}: {list(experts)}" for layer, experts in sorted(self.lost_L.items()))
        super().__init__(
            f"experts are lost, no rank has a copy or a backup and nobody can read a checkpoint: {told}; start again "
            f"from a checkpoint, and give Live a backup or a reader of checkpoints next time"
        )


class Mark(NamedTuple):
    """A generation of backups: of this epoch, after so many steps. A later one is larger."""

    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A member's part of a generation: its own experts as they were, and those it keeps for others. members: all who
    made it."""

    mark: Mark
    members: tuple[int, ...]
    held_L: tuple[tuple[int, ...], ...]
    backup_L: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        held, backup = _layers(fields["held_L"]), _layers(fields["backup_L"])
        return cls(mark=Mark(*fields["mark"]), members=tuple(fields["members"]), held_L=held, backup_L=backup)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a member truly has. held_L, backup_L: experts by layer. reads: it can read a checkpoint. saved_N: the
    generations it can go back to."""

    held_L: tuple[tuple[int, ...], ...]
    backup_L: tuple[tuple[int, ...], ...]
    reads: bool
    saved_N: tuple[Saved, ...] = ()

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        held, backup = _layers(fields["held_L"]), _layers(fields["backup_L"])
        saved_N = tuple(Saved.read(saved) for saved in fields["saved_N"])
        return cls(held_L=held, backup_L=backup, reads=bool(fields["reads"]), saved_N=saved_N)

    def at(self, mark: Mark) -> Self | None:
        """As it was then; None where that is not whole here."""
        then = next((saved for saved in self.saved_N if saved.mark == mark), None)
        return None if then is None else replace(self, held_L=then.held_L, backup_L=then.backup_L)


@dataclass(frozen=True, kw_only=True)
class Restore:
    """An expert that a member is to take from its backup of it, or from the checkpoint."""

    layer: int
    expert: int
    member: int
    source: str


@dataclass
class Repair:
    """Under way: who has to report, and what was heard. until: who is silent by then is dead."""

    until: float
    reason: str
    found: dict[int, Inventory]


def common(epoch: Epoch, found: Mapping[int, Inventory]) -> tuple[Mark | None, dict[int, Inventory]]:
    """The generation that all go back to, and what each had then; who made another one only is not among them.

    found: what each survivor has. The newest that is whole and has every expert; where none has, the newest that is
    whole. None, and all as it is, where there is none: so it is while nothing is trained.
    """
    assert epoch.plan is not None
    makers_of = {saved.mark: saved.members for inventory in found.values() for saved in inventory.saved_N}
    whole: list[tuple[Mark, dict[int, Inventory]]] = []
    for mark in sorted(makers_of, reverse=True):
        makers = [member for member in makers_of[mark] if member in found]
        then = {member: at for member in makers if (at := found[member].at(mark)) is not None}
        if len(then) == len(makers):
            whole.append((mark, then))
    for mark, then in whole:
        if not _missing(epoch.plan, then.values()):
            return mark, then
    return whole[0] if whole else (None, dict(found))


def _missing(plan: Plan, inventories: Collection[Inventory]) -> bool:
    return any(
        set(range(placement.num_experts))
        - {expert for each in inventories for expert in (*each.held_L[layer], *each.backup_L[layer])}
        for layer, placement in enumerate(plan.placement_L)
    )


def recovered(
    epoch: Epoch, number: int, serving: Sequence[int], found: Mapping[int, Inventory]
) -> tuple[Epoch, tuple[Restore, ...]]:
    """The epoch of that number in which the survivors go on, and what they must restore.

    epoch: the one that broke. serving: the survivors that go on in any case. found: what each survivor has; one that is
    not of those serving is called back only if it alone has an expert. Experts stay where they are: evening out is for
    a later change, which costs nobody a step.
    """
    assert epoch.plan is not None
    members = _members(serving, found)
    owners_L: list[dict[int, list[int]]] = []
    restores: list[Restore] = []
    lost_L: dict[int, list[int]] = {}
    for layer, placement in enumerate(epoch.plan.placement_L):
        load = Counter(dict.fromkeys(members, 0))
        owners: dict[int, list[int]] = {}
        for expert in range(placement.num_experts):
            listed = [m for m in members if expert in epoch.experts_of(m, layer) and expert in found[m].held_L[layer]]
            owners[expert] = listed
            load.update(listed)
        for expert in [expert for expert, listed in owners.items() if not listed]:
            chosen, source = _heir(layer, expert, members, found, load)
            if chosen is None:
                lost_L.setdefault(layer, []).append(expert)
                continue
            owners[expert] = [chosen]
            load[chosen] += 1
            if source:
                restores.append(Restore(layer=layer, expert=expert, member=chosen, source=source))
        owners_L.append(owners)
    if lost_L:
        raise ExpertsLostError(lost_L)
    plan = Plan(
        placement_L=tuple(_table(owners, members) for owners in owners_L),
        provenance={"planner": "recovery", "from": epoch.plan.fingerprint},
        layer_L=epoch.plan.layer_L,
    )
    return Epoch(number=number, members=members, plan=plan), tuple(restores)


def _layers(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(experts) for experts in rows)


def _members(serving: Sequence[int], found: Mapping[int, Inventory]) -> tuple[int, ...]:
    members = [member for member in serving if member in found]
    for other in sorted(found.keys() - set(members)):
        has = {(layer, expert) for layer, experts in enumerate(found[other].held_L) for expert in experts}
        known = {(layer, e) for m in members for layer, experts in enumerate(found[m].held_L) for e in experts}
        if has - known:
            members.append(other)
    return tuple(members)


def _heir(
    layer: int, expert: int, members: Sequence[int], found: Mapping[int, Inventory], load: Counter[int]
) -> tuple[int | None, str]:
    """Who has a copy besides the table, who has a backup, who can read it: of these the one that holds least."""
    ways = (
        ("", [member for member in members if expert in found[member].held_L[layer]]),
        (BACKUP, [member for member in members if expert in found[member].backup_L[layer]]),
        (CHECKPOINT, [member for member in members if found[member].reads]),
    )
    for source, able in ways:
        if able:
            return min(able, key=lambda member: (load[member], members.index(member))), source
    return None, ""


def _table(owners: Mapping[int, Sequence[int]], members: Sequence[int]) -> Placement:
    rows = [[expert for expert, who in owners.items() if member in who] for member in members]
    width = max(map(len, rows))
    return Placement(expert_RS=np.array([row + [EMPTY] * (width - len(row)) for row in rows], dtype=np.int64))
