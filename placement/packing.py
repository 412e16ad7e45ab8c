"""Packing copies onto ranks, heaviest first, every layer at once.

expert_LRS here is a working table: an expert, EMPTY for a free slot, ABSENT for a slot that the rank does not have.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import BoolArray, FloatArray, IntArray
from placement.plan import EMPTY, Placement
from placement.risk import risk
from placement.topology import Topology

ABSENT = -2
# Among ranks of equal risk, the one with less load in all scenarios together.
MEAN_TOO = 1e-3


def free_slots(layers: int, topology: Topology) -> IntArray:
    """expert_LRS with nothing in it."""
    slots_R = np.array(topology.slots_R)
    empty_RS = np.where(np.arange(slots_R.max())[None] < slots_R[:, None], EMPTY, ABSENT)
    return np.repeat(empty_RS[None], layers, axis=0).astype(np.int64)


def held_LRE(expert_LRS: IntArray, num_experts: int) -> BoolArray:
    """Which rank holds which expert; the last column, where EMPTY and ABSENT point, is never held."""
    held = np.zeros((*expert_LRS.shape[:2], num_experts + 1), dtype=np.bool_)
    layer_N, rank_N, slot_N = np.nonzero(expert_LRS >= 0)
    held[layer_N, rank_N, expert_LRS[layer_N, rank_N, slot_N]] = True
    return held


def pack(copies_LE: IntArray, load_LKE: FloatArray, topology: Topology, tail: float = 0.0) -> IntArray:
    """Copies in falling order of load, each to the rank that would finish first, never two of an expert on a rank.

    load_LKE is the load of an expert in each scenario (one is enough); a copy takes an even share. tail: see `risk`.
    """
    layers, num_experts = copies_LE.shape
    each_LEK = (load_LKE / copies_LE[:, None]).transpose(0, 2, 1)
    expert_LN = _by_load(copies_LE, risk(each_LEK, tail))
    expert_LRS = free_slots(layers, topology)
    slots_R, speed_R = np.array(topology.slots_R), np.array(topology.speed_R)
    load_LRK = np.zeros((layers, topology.ranks, load_LKE.shape[1]))
    taken_LR = np.zeros((layers, topology.ranks), dtype=np.int64)
    held = np.zeros((layers, num_experts, topology.ranks), dtype=np.bool_)
    for expert_L in expert_LN.T:
        row_L = np.flatnonzero(expert_L != EMPTY)
        chosen = expert_L[row_L]
        each = each_LEK[row_L, chosen]
        time_NRK = (load_LRK[row_L] + each[:, None]) / speed_R[:, None]
        time = risk(time_NRK, tail) + (MEAN_TOO * time_NRK.mean(axis=2) if time_NRK.shape[2] > 1 else 0.0)
        time[(taken_LR[row_L] >= slots_R) | held[row_L, chosen]] = np.inf
        rank = time.argmin(axis=1)
        stuck = np.isinf(time[np.arange(len(row_L)), rank])
        if stuck.any():
            for layer, expert in zip(row_L[stuck].tolist(), chosen[stuck].tolist(), strict=True):
                _make_room(expert_LRS[layer], expert)
                held[layer] = held_LRE(expert_LRS[layer][None], num_experts)[0, :, :-1].T
                taken_LR[layer] = (expert_LRS[layer] >= 0).sum(axis=1)
                load_LRK[layer] = held[layer].T @ each_LEK[layer]
            row_L, chosen, each, rank = row_L[~stuck], chosen[~stuck], each[~stuck], rank[~stuck]
        expert_LRS[row_L, rank, taken_LR[row_L, rank]] = chosen
        load_LRK[row_L, rank] += each
        taken_LR[row_L, rank] += 1
        held[row_L, chosen, rank] = True
    return expert_LRS


def _by_load(copies_LE: IntArray, each_LE: FloatArray) -> IntArray:
    """The expert of each copy, heaviest copy first, ties to the lowest expert; short rows end in EMPTY."""
    order_LE = np.argsort(-each_LE, axis=1, kind="stable")
    count_LE = np.take_along_axis(copies_LE, order_LE, axis=1)
    expert_LN = np.full((len(copies_LE), int(copies_LE.sum(axis=1).max())), EMPTY, dtype=np.int64)
    for layer, (experts, counts) in enumerate(zip(order_LE, count_LE, strict=True)):
        expert_LN[layer, : counts.sum()] = np.repeat(experts, counts)
    return expert_LN


def _make_room(expert_RS: IntArray, expert: int) -> None:
    """Put an expert on a full rank by passing others on, one rank to the next, until one has a free slot.

    The shortest chain of ranks, found breadth first; there is one whenever the counts can be placed at all.
    """
    holds = [set(row[row >= 0].tolist()) for row in expert_RS]
    came_from: dict[int, tuple[int, int] | None] = {r: None for r, held in enumerate(holds) if expert not in held}
    queue = [rank for rank in came_from if (expert_RS[rank] != ABSENT).any()]
    for rank in queue:
        if (expert_RS[rank] == EMPTY).any():
            _pass_on(expert_RS, came_from, rank, expert)
            return
        for follower in range(len(expert_RS)):
            movable = sorted(holds[rank] - holds[follower])
            if follower not in came_from and movable and (expert_RS[follower] != ABSENT).any():
                came_from[follower] = (rank, movable[0])
                queue.append(follower)
    raise AssertionError(f"no chain of moves makes room for expert {expert}; the counts were not checked")


def _pass_on(expert_RS: IntArray, came_from: dict[int, tuple[int, int] | None], rank: int, expert: int) -> None:
    slot = int(np.flatnonzero(expert_RS[rank] == EMPTY)[0])
    while (step := came_from[rank]) is not None:
        giver, passed = step
        expert_RS[rank, slot] = passed
        rank, slot = giver, int(np.flatnonzero(expert_RS[giver] == passed)[0])
    expert_RS[rank, slot] = expert


def placements(expert_LRS: IntArray) -> tuple[Placement, ...]:
    """The finished table: experts ascending on each rank, free slots last."""
    last = np.iinfo(np.int64).max
    tidy_LRS = np.sort(np.where(expert_LRS >= 0, expert_LRS, last), axis=2)
    return tuple(Placement(expert_RS=expert_RS) for expert_RS in np.where(tidy_LRS == last, EMPTY, tidy_LRS))


def working_table(placement_L: tuple[Placement, ...], topology: Topology) -> IntArray:
    """expert_LRS of finished placements, each expert in the first slots of its rank."""
    expert_LRS = free_slots(len(placement_L), topology)
    for layer, placement in enumerate(placement_L):
        for rank in range(topology.ranks):
            experts = placement.experts_of(rank)
            expert_LRS[layer, rank, : len(experts)] = experts
    return expert_LRS


def table_of(rank_LE: IntArray, topology: Topology) -> IntArray:
    """The working table of single copies whose ranks are given."""
    table = free_slots(len(rank_LE), topology)
    for layer, rank_E in enumerate(rank_LE):
        for rank in range(topology.ranks):
            experts = np.flatnonzero(rank_E == rank)
            table[layer, rank, : len(experts)] = experts
    return table
