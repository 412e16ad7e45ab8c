"""Epoch: who serves, and where the experts live, from one step on until another epoch takes its place.

Epochs are numbered upwards and no number is used again, nor is a member's. The rank of a member is its place in the
list. A Change leads from an epoch to the next; its experts travel while the old epoch still serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from placement import Migration, Placement, Plan, Topology, Wave, as_given, migrate

EMPTY = -1


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """plan: of as many ranks as there are members; None where nobody is left."""

    number: int
    members: tuple[int, ...]
    plan: Plan | None

    def __post_init__(self) -> None:
        ranks = 0 if self.plan is None else self.plan.ranks
        if len(set(self.members)) != len(self.members) or ranks != len(self.members):
            raise ValueError(f"epoch {self.number} has members {self.members} and a plan for {ranks} ranks")

    def rank_of(self, member: int) -> int:
        return self.members.index(member)

    def experts_of(self, member: int, layer: int) -> tuple[int, ...]:
        """In the order of the member's slots; none of who is no member."""
        if member not in self.members or self.plan is None:
            return ()
        return tuple(self.plan.placement_L[layer].experts_of(self.rank_of(member)).tolist())

    def fields(self) -> dict[str, Any]:
        plan = None if self.plan is None else self.plan.to_json()
        return {"number": self.number, "members": list(self.members), "plan": plan}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        plan = None if fields["plan"] is None else Plan.from_json(fields["plan"], source="the coordinator's plan")
        return cls(number=int(fields["number"]), members=tuple(fields["members"]), plan=plan)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """An expert's way between two members. layer: its place in the plan."""

    layer: int
    expert: int
    source: int
    destination: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """From one epoch to the next: transfer_N is what the new one's members lack."""

    old: Epoch
    new: Epoch
    transfer_N: tuple[Transfer, ...]

    @property
    def union(self) -> tuple[int, ...]:
        """All that take part: those who serve, then those who come."""
        return self.old.members + self.joiners

    @property
    def joiners(self) -> tuple[int, ...]:
        return tuple(member for member in self.new.members if member not in self.old.members)

    @property
    def leavers(self) -> tuple[int, ...]:
        return tuple(member for member in self.old.members if member not in self.new.members)

    @property
    def welcomes(self) -> tuple[tuple[int, int], ...]:
        """(who sends, who comes): what every rank has, to those who have it not, by turns."""
        old = self.old.members
        return tuple((old[turn % len(old)], joiner) for turn, joiner in enumerate(self.joiners))

    def fields(self) -> dict[str, Any]:
        transfers = [asdict(transfer) for transfer in self.transfer_N]
        return {"old": self.old.fields(), "new": self.new.fields(), "transfers": transfers}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        transfers = tuple(Transfer(**transfer) for transfer in fields["transfers"])
        return cls(old=Epoch.read(fields["old"]), new=Epoch.read(fields["new"]), transfer_N=transfers)


Stage = tuple[tuple[int, ...], Plan | None, tuple[Transfer, ...]]


def changes(
    epoch: Epoch,
    members: Sequence[int],
    slots_of: Mapping[int, int],
    *,
    spare: int = 1,
    portion: int = 0,
    byte_L: Sequence[int] = (),
    target: Plan | None = None,
) -> tuple[Stage, ...]:
    """The way from an epoch to other members, in the fewest moves: (members, plan, transfers) of each epoch on it.

    slots_of: the most experts of a layer that a member may hold; 0 for as many as there are. Who comes serves from the
    first of these epochs on, who goes until the last. Most often one is enough; more where a rank's memory, max(before,
    after) + spare experts of a layer, asks for waves, or where no more than `portion` bytes may move at once to or from
    a rank; 0 for any number. byte_L: what an expert of each layer weighs, 1 where not given. target: where experts are
    to live, a rank for each of the members, who stay the same; else they are spread evenly. Raises where the members
    have no room for the experts, or one weighs more than a portion.
    """
    if not members:
        return (((), None, ()),)
    assert epoch.plan is not None
    stay = [member for member in epoch.members if member in members]
    come = [member for member in members if member not in epoch.members]
    go = [member for member in epoch.members if member not in members]
    union, kept = (*stay, *come, *go), (*stay, *come)
    start = Plan(placement_L=tuple(_over(union, epoch, p) for p in epoch.plan.placement_L), layer_L=epoch.plan.layer_L)
    most = max(placement.num_experts for placement in start.placement_L)
    slots_R = tuple((slots_of.get(member) or most) * (member not in go) for member in union)
    if target is None:
        topology = Topology(slots_R=slots_R, ranks_per_node=len(union))
        migration = migrate(start, topology, spare=spare, byte_L=byte_L)
    else:
        _require_room(target, members, slots_R)
        migration = migrate(start, target, spare=spare, naming=as_given, byte_L=byte_L)
    stages = [list(waves) for waves in migration.boundaries(portion)] if portion else _stages(migration)
    stages = stages or [[]]
    now, made = list(start.placement_L), []
    for turn, stage in enumerate(stages):
        for wave in stage:
            now[wave.layer] = wave.after
        serving = kept if turn == len(stages) - 1 else union
        rows = tuple(Placement(expert_RS=placement.expert_RS[: len(serving)]) for placement in now)
        made.append((serving, Plan(placement_L=rows, layer_L=start.layer_L), _transfers(stage, union)))
    return tuple(made)


def same_homes(one: Plan | None, other: Plan | None) -> bool:
    """Whether each rank has the same experts, in whatever slots."""
    if one is None or other is None:
        return one is other
    held_L, theirs_L = ([p.held_RE for p in plan.placement_L] for plan in (one, other))
    return all(np.array_equal(held_RE, theirs_RE) for held_RE, theirs_RE in zip(held_L, theirs_L, strict=True))


def _require_room(target: Plan, members: Sequence[int], slots_R: Sequence[int]) -> None:
    if target.ranks != len(members):
        raise ValueError(f"the plan is for {target.ranks} ranks; {len(members)} members serve")
    for rank, (member, slots) in enumerate(zip(members, slots_R)):
        most = max(len(placement.experts_of(rank)) for placement in target.placement_L)
        if most > slots:
            raise ValueError(f"the plan puts {most} experts of a layer on member {member}, which has room for {slots}")


def _over(union: Sequence[int], epoch: Epoch, placement: Placement) -> Placement:
    """The table with a row for each of the union's members, empty for those who come."""
    empty = np.full(placement.expert_RS.shape[1], EMPTY)
    row_of = dict(zip(epoch.members, placement.expert_RS))
    return Placement(expert_RS=np.stack([row_of.get(member, empty) for member in union]))


def _stages(migration: Migration) -> list[list[Wave]]:
    """The first waves of all layers together, the second ones, ...; one stage without waves where nothing moves."""
    stages: list[list[Wave]] = [[]]
    turn_L = [0] * len(migration.byte_L)
    for wave in migration.wave_N:
        if turn_L[wave.layer] == len(stages):
            stages.append([])
        stages[turn_L[wave.layer]].append(wave)
        turn_L[wave.layer] += 1
    return stages


def _transfers(stage: Sequence[Wave], union: Sequence[int]) -> tuple[Transfer, ...]:
    return tuple(
        Transfer(layer=wave.layer, expert=move.expert, source=union[move.source], destination=union[move.destination])
        for wave in stage
        for move in wave.move_N
    )
