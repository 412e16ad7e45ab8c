"""After a death: who serves from now on, and where each expert comes from. Decided from what is truly there.

Ranks may have seen the flip of an epoch or not, so no table is trusted: every survivor says what it holds, arrivals of
a change under way included, and what it keeps as a backup of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

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


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a member truly has. held_L, backup_L: experts by layer. reads: it can read a checkpoint."""

    held_L: tuple[tuple[int, ...], ...]
    backup_L: tuple[tuple[int, ...], ...]
    reads: bool

    def fields(self) -> dict[str, Any]:
        return {"held": [list(h) for h in self.held_L], "backup": [list(b) for b in self.backup_L], "reads": self.reads}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        held, backup = (tuple(tuple(experts) for experts in fields[name]) for name in ("held", "backup"))
        return cls(held_L=held, backup_L=backup, reads=bool(fields["reads"]))


@dataclass(frozen=True, kw_only=True)
class Restore:
    """An expert that a member is to take from its backup of it, or from the checkpoint."""

    layer: int
    expert: int
    member: int
    source: str


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
