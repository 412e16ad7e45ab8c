"""The placement nearest to one that is running: even numbers of experts on the ranks there are, fewest experts fetched.

With single copies the fetches are E - sum over ranks of min(held, c): no placement with c experts on each rank needs
fewer, as a rank can keep no more than it holds and no more than it may.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import BoolArray, IntArray
from placement.copies import require_room
from placement.plan import EMPTY, Placement
from placement.topology import Topology

FAR = np.iinfo(np.int64).max // 4


def fewest_moves(running: Placement, topology: Topology) -> Placement:
    """Copies are kept as far as there is room for them. Of two ways with as many fetches, the one with more of them
    from the same node."""
    held_RE, num_experts = on_ranks(running, topology.ranks), running.num_experts
    require_room(num_experts, topology)
    seats_R = np.minimum(np.array(topology.slots_R), num_experts)
    copies_E = np.minimum(running.copies_E, (seats_R > 0).sum())
    while True:
        if copies_E.sum() <= seats_R.sum():
            count_R = even_counts(int(copies_E.sum()), seats_R, held_RE.sum(axis=1))
            found_RE = _nearest(held_RE, copies_E, count_R, np.array(topology.node_R))
            if found_RE is not None:
                return _seated(running, found_RE, topology)
        # Too many copies of few experts for the room there is. Single copies always fit.
        copies_E[copies_E.argmax()] -= 1


def even_counts(slots: int, seats_R: IntArray, held_R: IntArray) -> IntArray:
    """So many slots over ranks with so many seats, as evenly as can be; the odd ones to the ranks that hold most."""
    level = 0
    while np.minimum(seats_R, level + 1).sum() <= slots and level < seats_R.max(initial=0):
        level += 1
    count_R: IntArray = np.minimum(seats_R, level)
    more = np.flatnonzero(seats_R > level)
    first = more[np.argsort(-held_R[more], kind="stable")]
    count_R[first[: slots - int(count_R.sum())]] += 1
    return count_R


def on_ranks(placement: Placement, ranks: int) -> BoolArray:
    """held_RE for another number of ranks: ranks that come hold nothing, what the last ranks held is gone with them."""
    held_RE = np.zeros((ranks, placement.num_experts), dtype=np.bool_)
    both = min(ranks, placement.ranks)
    held_RE[:both] = placement.held_RE[:both]
    return held_RE


def _nearest(held_RE: BoolArray, copies_E: IntArray, count_R: IntArray, node_R: IntArray) -> BoolArray | None:
    """Who holds what, with so many copies of each expert and so many experts on each rank; None where there is no way.

    What can stay, stays: that costs nothing. Each copy left enters by the cheapest chain of replacements, a shortest
    path over the ranks, so the total is least: successive shortest paths, started from a flow without cost.
    """
    near_RE = (node_R[:, None] == node_R) @ held_RE.astype(np.int64) > 0
    fetch = int(copies_E.sum()) + 1  # one fetch fewer outweighs any number of nodes crossed
    cost_RE = np.where(held_RE, 0, np.where(near_RE, fetch, fetch + 1))
    kept_RE = held_RE & (held_RE.cumsum(axis=0) <= copies_E)
    on_RE: BoolArray = kept_RE & (kept_RE.cumsum(axis=1) <= count_R[:, None])
    all_stay = bool((copies_E >= held_RE.sum(axis=0)).all())
    old_R = near_RE.any(axis=1)  # on a node that holds something
    for expert in np.repeat(np.arange(len(copies_E)), copies_E - on_RE.sum(axis=0)).tolist():
        room_R = count_R - on_RE.sum(axis=1)
        direct_R = np.where(on_RE[:, expert], FAR, cost_RE[:, expert])
        rank = int(np.where(room_R > 0, direct_R, FAR).argmin())
        # Where all that could stay has stayed, no chain beats a fetch within a node; nor any fetch to a new node, if
        # only new nodes have room and nothing moved on the others.
        cheapest = direct_R[rank] <= fetch or not (room_R[old_R].any() or (on_RE & ~held_RE)[old_R].any())
        if room_R[rank] > 0 and direct_R[rank] < FAR and all_stay and cheapest:
            on_RE[rank, expert] = True
        elif not _enter(on_RE, cost_RE, direct_R, room_R, expert):
            return None
    return on_RE


def _enter(on_RE: BoolArray, cost_RE: IntArray, direct_R: IntArray, room_R: IntArray, expert: int) -> bool:
    """In place: one more copy of the expert, along the cheapest chain; False where no chain ends at a rank with room.

    Bellman-Ford; step[g, h] is the cheapest change of any expert on rank g that rank h does not hold.
    """
    ranks = len(on_RE)
    change_RRE = np.where(on_RE[:, None] & ~on_RE[None], cost_RE[None] - cost_RE[:, None], FAR)
    who_RR = change_RRE.argmin(axis=2)
    step_RR = np.take_along_axis(change_RRE, who_RR[:, :, None], axis=2)[:, :, 0]
    cost_R, before_R = direct_R.copy(), np.full(ranks, -1)
    for _ in range(ranks - 1):
        via_RR = np.minimum(cost_R[:, None] + step_RR, FAR)
        best_R = via_RR.argmin(axis=0)
        better_R = via_RR[best_R, np.arange(ranks)] < cost_R
        if not better_R.any():
            break
        cost_R = np.where(better_R, via_RR[best_R, np.arange(ranks)], cost_R)
        before_R = np.where(better_R, best_R, before_R)
    ends_R = np.where(room_R > 0, cost_R, FAR)
    rank = int(ends_R.argmin())
    if ends_R[rank] >= FAR:
        return False
    while (giver := int(before_R[rank])) >= 0:
        mover = int(who_RR[giver, rank])
        on_RE[giver, mover], on_RE[rank, mover] = False, True
        rank = giver
    on_RE[rank, expert] = True
    return True


def _seated(running: Placement, held_RE: BoolArray, topology: Topology) -> Placement:
    """Every expert that stays keeps its slot where the rank still has it; the others take the first slots free."""
    rows = [running.expert_RS[rank] if rank < running.ranks else () for rank in range(topology.ranks)]
    width = max(topology.slots_R)
    return Placement(expert_RS=np.stack([seats(row, held_E, width) for row, held_E in zip(rows, held_RE, strict=True)]))


def seats(row_S: IntArray | tuple[()], held_E: BoolArray, width: int) -> IntArray:
    """A rank's slots with these experts in them: who was in one of the slots before is in it again."""
    seat_S = np.full(width, EMPTY, dtype=np.int64)
    for slot, expert in enumerate(list(row_S)[:width]):
        if expert != EMPTY and held_E[expert]:
            seat_S[slot] = expert
    coming = np.setdiff1d(np.flatnonzero(held_E), seat_S)
    seat_S[np.flatnonzero(seat_S == EMPTY)[: len(coming)]] = coming
    return seat_S
