"""Planners for one load: deal like cards, or copy, pack and refine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from placement.apart import apart
from placement.arrays import FloatArray, IntArray
from placement.bounds import peak_bound_L
from placement.certify import certified
from placement.copies import apportion, require_room
from placement.fewer import EMPTY_WORTH, dealt, fewer, keep_better, widened
from placement.joint import refine_copies, search
from placement.packing import pack, placements
from placement.plan import EMPTY, Placement, Plan
from placement.refine import rank_time, refine_swaps
from placement.topology import Topology
from placement.trace import LoadTrace


class Planner(Protocol):
    """(LoadTrace, Topology) -> Plan: deterministic to the byte, each layer certified, no expert twice on a rank."""

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan: ...


@dataclass(frozen=True, kw_only=True)
class RoundRobin:
    """Deal the experts to the ranks like cards, whatever their load; pass over full ranks, leave spare slots empty.

    The baseline, and what a layer does when it is given no placement.
    """

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        placement = self.place(trace.num_experts, topology)
        return certified((placement,) * trace.layers, trace, topology, {"planner": "round-robin"})

    def place(self, num_experts: int, topology: Topology) -> Placement:
        if num_experts < 1:
            raise ValueError(f"a layer needs at least 1 expert; got {num_experts}")
        require_room(num_experts, topology)
        expert_RS = np.full((topology.ranks, max(topology.slots_R)), EMPTY, dtype=np.int64)
        expert = 0
        for slot in range(max(topology.slots_R)):
            for rank, slots in enumerate(topology.slots_R):
                if slot < slots and expert < num_experts:
                    expert_RS[rank, slot] = expert
                    expert += 1
        return Placement(expert_RS=expert_RS)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Balance the load of all windows together: copies in closed form, packing, swaps, then counts and places jointly.

    within: how far above its bound a layer's peak may stay before more work is spent on it, as a share.
    searched: layers of at most this many experts x slots that are still further off go through the beam search.
    """

    within: float = 2e-4
    searched: int = 1024
    seed: int = 0

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        table = self.pack(trace.load_LE, topology)
        table = apart(table, trace.load_LE, topology)
        return certified(placements(table), trace, topology, {"planner": "packed", "seed": self.seed})

    def pack(self, load_LE: FloatArray, topology: Topology) -> IntArray:
        """expert_LRS, a working table: never worse than RoundRobin's, nor, but for a hair, than with fewer slots."""

        def time(part_LRS: IntArray, layer_A: IntArray) -> FloatArray:
            peak: FloatArray = rank_time(part_LRS, load_LE[layer_A], topology).max(axis=1)
            return peak

        table, every = self._packed(load_LE, topology), np.arange(len(load_LE))
        keep_better(table, dealt(len(load_LE), load_LE.shape[1], topology), every, time)
        enough_L = peak_bound_L(load_LE, topology) * load_LE.sum(axis=1) / sum(topology.speed_R) * (1 + 5 * self.within)
        for smaller in fewer(topology, load_LE.shape[1]):
            far = np.flatnonzero(time(table, every) > enough_L)
            if not far.size:
                break
            keep_better(
                table, widened(self._packed(load_LE[far], smaller), topology), far, time, EMPTY_WORTH * topology.uniform
            )
        return table

    def _packed(self, load_LE: FloatArray, topology: Topology) -> IntArray:
        table = pack(apportion(load_LE, topology), load_LE[:, None], topology)
        mean_L = load_LE.sum(axis=1) / sum(topology.speed_R)
        bound_L = peak_bound_L(load_LE, topology) * mean_L
        table = refine_swaps(table, load_LE, topology, bound_L * (1 + self.within))
        far_L = np.flatnonzero(rank_time(table, load_LE, topology).max(axis=1) > bound_L * (1 + 5 * self.within))
        if far_L.size:
            enough_L = bound_L[far_L] * (1 + 5 * self.within)
            table[far_L] = refine_copies(table[far_L], load_LE[far_L], topology, enough_L)
        if load_LE.shape[1] * topology.slots > self.searched:
            return table
        peak_L = rank_time(table, load_LE, topology).max(axis=1)
        for layer in np.flatnonzero(peak_L > bound_L * (1 + self.within)).tolist():
            enough = bound_L[layer] * (1 + self.within)
            found_RS = search(load_LE[layer], topology, enough, seed=self.seed)
            if rank_time(found_RS[None], load_LE[layer][None], topology).max() < peak_L[layer]:
                table[layer] = found_RS
        return table
