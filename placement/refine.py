"""Improving a table: swap experts between the busiest rank and another, and hand a copy from one expert to another.

Every step lowers the objective, so refinement ends, and its result is never worse than its start. The objective of a
layer is the time of its busiest rank plus, where the planner asks, what it charges for where experts are.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.packing import ABSENT, held_LRE
from placement.topology import Topology

# An improvement smaller than this, relative to the peak, is rounding.
LEAST = 1e-9


def copies_of(expert_LRS: IntArray, num_experts: int) -> IntArray:
    copies_LE: IntArray = held_LRE(expert_LRS, num_experts)[:, :, :num_experts].sum(axis=1)
    return copies_LE


def slot_load(expert_LRS: IntArray, load_LE: FloatArray) -> FloatArray:
    """load_LRS: what each slot carries, copies sharing evenly; 0 in a free slot."""
    num_experts = load_LE.shape[1]
    each_LE = np.pad(load_LE / copies_of(expert_LRS, num_experts), ((0, 0), (0, 1)))
    layer = np.arange(len(expert_LRS))[:, None, None]
    slot: FloatArray = each_LE[layer, np.where(expert_LRS >= 0, expert_LRS, num_experts)]
    return slot


def rank_time(expert_LRS: IntArray, load_LE: FloatArray, topology: Topology) -> FloatArray:
    time_LR: FloatArray = slot_load(expert_LRS, load_LE).sum(axis=2) / np.array(topology.speed_R)
    return time_LR


def refine_swaps(
    expert_LRS: IntArray,
    load_LE: FloatArray,
    topology: Topology,
    enough_L: FloatArray,
    *,
    charge_LER: FloatArray | None = None,
    most_swaps: int = 400,
) -> IntArray:
    """The best swap of the busiest rank with any other, again and again, until none helps or the peak is good enough.

    A free slot swaps like an expert without load, so this moves experts as well. charge_LER: seconds that a layer pays
    for a copy of an expert on a rank.
    """
    tables = Tables(expert_LRS, load_LE, topology, charge_LER)
    active = np.arange(len(expert_LRS))
    for _ in range(most_swaps):
        time_LR = tables.load_LR[active] / tables.speed_R
        hot_L = time_LR.argmax(axis=1)
        peak_L = time_LR.max(axis=1)
        going = peak_L > enough_L[active]
        active, hot_L, peak_L = active[going], hot_L[going], peak_L[going]
        if not active.size:
            break
        value = tables.values(active, hot_L)
        best = value.argmin(axis=1)
        better = value[np.arange(len(active)), best] < peak_L * (1 - LEAST)
        active, hot_L, best = active[better], hot_L[better], best[better]
        tables.swap(active, hot_L, best)
    return tables.expert_LRS


class Tables:
    """The tables of many layers under swaps: what each slot holds and carries, and who holds what. Changes in place."""

    def __init__(
        self, expert_LRS: IntArray, load_LE: FloatArray, topology: Topology, charge_LER: FloatArray | None
    ) -> None:
        self.expert_LRS = expert_LRS.copy()
        self.load_LRS = slot_load(expert_LRS, load_LE)
        self.load_LR = self.load_LRS.sum(axis=2)
        self.held_LRE = held_LRE(expert_LRS, load_LE.shape[1])
        self.speed_R = np.array(topology.speed_R)
        self.charge_LER = None if charge_LER is None else np.pad(charge_LER, ((0, 0), (0, 1), (0, 0)))

    def values(self, layer_A: IntArray, hot_A: IntArray) -> FloatArray:
        """value[a, s * N + n]: the two ranks' peak once the hot rank's slot s trades with slot n of all N slots."""
        ranks, slots = self.expert_LRS.shape[1:]
        active, row = len(layer_A), np.arange(len(layer_A))[:, None]
        mine, theirs = self.expert_LRS[layer_A, hot_A], self.expert_LRS[layer_A].reshape(active, -1)
        given = self.load_LRS[layer_A, hot_A][:, :, None] - self.load_LRS[layer_A].reshape(active, 1, -1)
        load_AR = self.load_LR[layer_A]
        after = (load_AR[row[:, 0], hot_A][:, None, None] - given) / self.speed_R[hot_A][:, None, None]
        given += np.repeat(load_AR, slots, axis=1)[:, None]
        given /= np.repeat(self.speed_R, slots)
        np.maximum(after, given, out=after)
        # EMPTY and ABSENT point to the last column, which nobody holds and which costs nothing.
        mine_at, theirs_at = np.maximum(mine, -1), np.maximum(theirs, -1)
        mine_held = self.held_LRE[layer_A].transpose(0, 2, 1)[row, mine_at]
        theirs_held = self.held_LRE[layer_A, hot_A][row, theirs_at] | (theirs == ABSENT)
        if self.charge_LER is not None:
            charge = self.charge_LER[layer_A]
            mine_cost = charge[row, mine_at] - charge[row, mine_at, hot_A[:, None]][:, :, None]
            rank_N = np.repeat(np.arange(ranks), slots)
            theirs_cost = charge[row, theirs_at, hot_A[:, None]] - charge[row, theirs_at, rank_N[None]]
            after += np.repeat(mine_cost, slots, axis=2) + theirs_cost[:, None]
        after[np.repeat(mine_held, slots, axis=2) | theirs_held[:, None] | (mine == ABSENT)[:, :, None]] = np.inf
        value: FloatArray = after.reshape(active, -1)
        return value

    def swap(self, layer_A: IntArray, hot_A: IntArray, best_A: IntArray) -> None:
        ranks, slots = self.expert_LRS.shape[1:]
        slot_A, other_A = best_A // (ranks * slots), best_A % (ranks * slots)
        one, other = (layer_A, hot_A, slot_A), (layer_A, other_A // slots, other_A % slots)
        for table in (self.expert_LRS, self.load_LRS):
            table[one], table[other] = table[other], table[one].copy()
        for layer, rank, _ in (one, other):
            self.load_LR[layer, rank] = self.load_LRS[layer, rank].sum(axis=1)
            self.held_LRE[layer, rank] = False
            row_N, slot_N = np.nonzero(self.expert_LRS[layer, rank] >= 0)
            expert_N = self.expert_LRS[layer[row_N], rank[row_N], slot_N]
            self.held_LRE[layer[row_N], rank[row_N], expert_N] = True
