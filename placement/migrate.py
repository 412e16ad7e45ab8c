"""Migration: from the plan that is running to another, in the fewest moves and in waves that memory can bear.

A wave's experts arrive, all of them, before any rank gives up a copy for them; then the layer has a placement of its
own, valid and whole, and whoever carries the migration out may stop there for as long as it likes. In no wave does a
rank hold more than max(before, after) + spare experts of the layer.

Such waves never get stuck. If every rank that still waits for experts were full, each would hold its final number and
spare more, so it would still have to give up more than it waits for. But every expert given up is one that another rank
waits for, so all of these ranks together cannot have more to give up than to get.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from placement.fewest import fewest_moves, seats
from placement.plan import EMPTY, Placement, Plan
from placement.rename import machine_of, rename
from placement.topology import Topology

Naming = Callable[[Plan, Plan, Sequence[int]], Plan]
NOBODY = -1


@dataclass(frozen=True, kw_only=True)
class Move:
    """An expert goes to another rank for good. source: who sends it. vacates: the rank that gives up its copy for it,
    most often the source; NOBODY where all copies stay."""

    expert: int
    source: int
    destination: int
    vacates: int = NOBODY


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Moves of one layer that happen together. freed_N: (rank, expert) of copies given up beforehand, for nothing in
    return; others remain.

    layer: its place in the plans. after: the layer's placement once all of it is done.
    """

    layer: int
    move_N: tuple[Move, ...]
    freed_N: tuple[tuple[int, int], ...]
    after: Placement


@dataclass(frozen=True, kw_only=True)
class Migration:
    """How to get from start to target. ranks: of both plans, whichever has more; ranks that come start out empty, ranks
    that go end up empty. byte_L: what an expert of each layer weighs, with all that moves along."""

    start: Plan
    target: Plan
    wave_N: tuple[Wave, ...]
    byte_L: tuple[int, ...]
    spare: int
    node_R: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return max(self.start.ranks, self.target.ranks)

    @property
    def moves(self) -> int:
        return sum(len(wave.move_N) for wave in self.wave_N)

    @property
    def bytes(self) -> int:
        return sum(len(wave.move_N) * self.byte_L[wave.layer] for wave in self.wave_N)

    def boundaries(self, most_bytes: float) -> Iterator[tuple[Wave, ...]]:
        """The waves cut into portions in which no rank sends or receives more than most_bytes: one portion for each
        step boundary, what it takes there being bounded by the busiest rank."""
        moving = {wave.layer for wave in self.wave_N if wave.move_N}
        if (most := max((self.byte_L[layer] for layer in moving), default=0)) > most_bytes:
            raise ValueError(f"an expert weighs {most} bytes, more than the {most_bytes:g} that may move at a boundary")
        now = list(padded(self.start, self.ranks))
        portion: list[Wave] = []
        sent_R, got_R = Counter[int](), Counter[int]()
        for wave in self.wave_N:
            weight, freed_N, taken = self.byte_L[wave.layer], wave.freed_N, list[Move]()
            now[wave.layer] = moved(now[wave.layer], (), freed_N)
            for move in wave.move_N:
                # Who was to send may have given up its copy at the boundary before.
                source = _source(move, now[wave.layer], self.node_R, sent_R)
                if max(sent_R[source], got_R[move.destination]) + weight > most_bytes:
                    if taken:
                        now[wave.layer] = moved(now[wave.layer], taken)
                        portion.append(replace(wave, move_N=tuple(taken), freed_N=freed_N, after=now[wave.layer]))
                        freed_N, taken = (), []
                    yield tuple(portion)
                    portion, sent_R, got_R = [], Counter(), Counter()
                    source = _source(move, now[wave.layer], self.node_R, sent_R)
                sent_R[source] += weight
                got_R[move.destination] += weight
                taken.append(replace(move, source=source))
            now[wave.layer] = wave.after
            portion.append(replace(wave, move_N=tuple(taken), freed_N=freed_N))
        if portion:
            yield tuple(portion)


def migrate(
    start: Plan,
    target: Plan | Topology,
    *,
    byte_L: Sequence[int] = (),
    spare: int = 1,
    naming: Naming = rename,
) -> Migration:
    """From the running plan to a target plan, its ranks named so that least moves; or, where a machine is given, to the
    plan for it that is nearest.

    byte_L: what an expert of each layer weighs; 1 where not given. spare: experts that a rank may hold for the time of
    a wave beyond what it holds before or after. Raises before anything moves where there is no way.
    """
    if spare < 1:
        raise ValueError(f"spare={spare}; a rank needs room for at least 1 expert that arrives before another leaves")
    weights = tuple(int(weight) for weight in byte_L) or (1,) * len(start.placement_L)
    if len(weights) != len(start.placement_L) or min(weights) < 1:
        raise ValueError(f"byte_L needs a number >= 1 for each of {len(start.placement_L)} layers; got {weights}")
    if isinstance(target, Topology):
        target = nearest(start, target)
    else:
        _require_one_model(start, target)
        target = naming(start, target, weights)
    ranks = max(start.ranks, target.ranks)
    node_R = (machine_of(target) if target.ranks == ranks else machine_of(start)).node_R
    waves = [
        wave
        for layer, (old, new) in enumerate(zip(padded(start, ranks), padded(target, ranks), strict=True))
        for wave in _waves(layer, old, new, node_R, spare)
    ]
    return Migration(start=start, target=target, wave_N=tuple(waves), byte_L=weights, spare=spare, node_R=node_R)


def nearest(start: Plan, topology: Topology) -> Plan:
    """A plan for another machine, as near to the running one as can be. It promises even numbers, not even loads."""
    return Plan(
        placement_L=tuple(fewest_moves(placement, topology) for placement in start.placement_L),
        provenance={"planner": "fewest moves", "from": start.fingerprint},
        topology=topology,
        layer_L=start.layer_L,
    )


def moved(placement: Placement, move_N: Sequence[Move], freed_N: Sequence[tuple[int, int]] = ()) -> Placement:
    """The placement after some moves. Who stays keeps its slot."""
    held_RE = placement.held_RE.copy()
    for move in move_N:
        held_RE[move.destination, move.expert] = True
        if move.vacates != NOBODY:
            held_RE[move.vacates, move.expert] = False
    for rank, expert in freed_N:
        held_RE[rank, expert] = False
    width = max(placement.expert_RS.shape[1], int(held_RE.sum(axis=1).max()))
    rows = zip(placement.expert_RS, held_RE, strict=True)
    return Placement(expert_RS=np.stack([seats(row_S, held_E, width) for row_S, held_E in rows]))


def padded(plan: Plan, ranks: int) -> tuple[Placement, ...]:
    """The placements with empty ranks behind the last, up to so many."""
    if plan.ranks == ranks:
        return plan.placement_L
    more = ((0, ranks - plan.ranks), (0, 0))
    return tuple(Placement(expert_RS=np.pad(p.expert_RS, more, constant_values=EMPTY)) for p in plan.placement_L)


def _waves(layer: int, old: Placement, new: Placement, node_R: Sequence[int], spare: int) -> Iterator[Wave]:
    pending, freed_N = _moves(old, new, node_R)
    room_R = np.maximum(old.held_RE.sum(axis=1), new.held_RE.sum(axis=1)) + spare
    now = moved(old, (), freed_N)
    while pending:
        sent_R: Counter[int] = Counter()
        coming_R, taken, waiting = now.held_RE.sum(axis=1), list[Move](), list[Move]()
        for move in pending:
            if coming_R[move.destination] == room_R[move.destination]:
                waiting.append(move)
                continue
            coming_R[move.destination] += 1
            source = _source(move, now, node_R, sent_R)
            sent_R[source] += 1
            taken.append(replace(move, source=source))
        assert taken, "every rank that waits is full; spare >= 1 rules this out"
        now, pending = moved(now, taken), waiting
        # The very slots of the target, once all are there.
        after = now if pending else new
        yield Wave(layer=layer, move_N=tuple(taken), freed_N=freed_N, after=after)
        freed_N = ()
    if freed_N:
        yield Wave(layer=layer, move_N=(), freed_N=freed_N, after=new)


def _moves(old: Placement, new: Placement, node_R: Sequence[int]) -> tuple[list[Move], tuple[tuple[int, int], ...]]:
    """(moves, the copies that are given up for none): of an expert that comes to as many ranks as it leaves, each rank
    waits until a rank has got it, one on its own node if there is one. An expert never has fewer copies on the way
    than at the start or at the end, whichever is less."""
    moves: list[Move] = []
    freed: list[tuple[int, int]] = []
    come_RE, leave_RE = new.held_RE & ~old.held_RE, old.held_RE & ~new.held_RE
    for expert in np.flatnonzero((come_RE | leave_RE).any(axis=0)).tolist():
        leaving = np.flatnonzero(leave_RE[:, expert]).tolist()
        coming = np.flatnonzero(come_RE[:, expert]).tolist()
        for near in (True, False):
            for destination in list(coming):
                found = [rank for rank in leaving if (node_R[rank] == node_R[destination]) or not near]
                if found:
                    vacates = found[0]
                    leaving.remove(vacates)
                    coming.remove(destination)
                    moves.append(Move(expert=expert, source=NOBODY, destination=destination, vacates=vacates))
        moves += [Move(expert=expert, source=NOBODY, destination=rank) for rank in coming]
        freed += [(rank, expert) for rank in leaving]
    return sorted(moves, key=lambda move: (move.expert, move.destination)), tuple(freed)


def _source(move: Move, now: Placement, node_R: Sequence[int], sent_R: Counter[int]) -> int:
    """Who sends: a holder on the same node if there is one, then who has sent least in this wave."""
    holders: list[int] = np.flatnonzero(now.held_RE[:, move.expert]).tolist()
    here = node_R[move.destination]
    return min(holders, key=lambda rank: (node_R[rank] != here, sent_R[rank], rank))


def _require_one_model(start: Plan, target: Plan) -> None:
    sizes = [(plan.layer_L, [p.num_experts for p in plan.placement_L]) for plan in (start, target)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"cannot go from a plan of {len(start.placement_L)} layers x {start.placement_L[0].num_experts} experts to "
            f"one of {len(target.placement_L)} x {target.placement_L[0].num_experts}; use plans of one model"
        )
