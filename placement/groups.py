"""Expert groups and nodes: routers that pick groups first send less between nodes where a group lives on one node.

Keeping every group whole costs balance, often more than it saves, so Priced weighs one against the other; Strict obeys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.certify import certified
from placement.copies import apportion, require_room
from placement.greedy import Packed
from placement.packing import free_slots, pack, placements
from placement.plan import Placement, Plan, Provenance
from placement.refine import rank_time, refine_swaps, slot_load
from placement.topology import Topology
from placement.trace import LoadTrace


@dataclass(frozen=True, kw_only=True)
class StrictGroups:
    """Every group whole on one node, all its copies too: groups packed onto nodes, then each node's experts Packed."""

    groups: int
    packed: Packed = field(default_factory=Packed)

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        table = self.pack(trace.load_LE, topology)
        made: Provenance = {"planner": "packed, strict groups", "groups": self.groups, "seed": self.packed.seed}
        return certified(placements(table), trace, topology, made)

    def pack(self, load_LE: FloatArray, topology: Topology) -> IntArray:
        require_room(load_LE.shape[1], topology)
        size = _group_size(load_LE.shape[1], self.groups)
        node_R = np.array(topology.node_R)
        speed_R = np.array(topology.speed_R)
        room_D = _room_D(topology, size)
        if sum(room_D) < self.groups:
            raise ValueError(f"{self.groups} groups of {size} experts do not fit nodes with room for {room_D}, whole")
        whole = Topology(
            # Even counts of groups where the nodes allow it: no node is left with spare slots that another one lacks.
            slots_R=_evenly(room_D, self.groups),
            ranks_per_node=1,
            speed_R=tuple(float(speed_R[node_R == node].sum()) for node in range(topology.nodes)),
        )
        group_LG = load_LE.reshape(len(load_LE), self.groups, size).sum(axis=2)
        on_LDS = pack(apportion(group_LG, whole), group_LG[:, None], whole)
        on_LDS = refine_swaps(on_LDS, group_LG, whole, np.zeros(len(load_LE)))
        table = free_slots(len(load_LE), topology)
        for node in range(topology.nodes):
            self._pack_node(table, load_LE, topology, on_LDS[:, node], np.flatnonzero(node_R == node))
        return table

    def _pack_node(
        self, table: IntArray, load_LE: FloatArray, topology: Topology, group_LS: IntArray, rank_N: IntArray
    ) -> None:
        size = load_LE.shape[1] // self.groups
        node = replace(
            topology,
            slots_R=tuple(topology.slots_R[rank] for rank in rank_N),
            speed_R=tuple(topology.speed_R[rank] for rank in rank_N),
            memory_R=(),
            expert_bytes=0,
        )
        # Every node takes the same number of groups in every layer: the whole machine has room for just so many.
        held = int((group_LS[0] >= 0).sum())
        if not held:
            return
        group_LG = np.sort(group_LS, axis=1)[:, -held:]
        expert_LE = (group_LG[:, :, None] * size + np.arange(size)).reshape(len(load_LE), -1)
        local = self.packed.pack(np.take_along_axis(load_LE, expert_LE, axis=1), node)
        row = np.arange(len(load_LE))[:, None, None]
        table[:, rank_N, : local.shape[2]] = np.where(local >= 0, expert_LE[row, np.maximum(local, 0)], local)


@dataclass(frozen=True, kw_only=True)
class PricedGroups:
    """Balance, plus a price for load that leaves its group's node: the cheapest of flat, strict, and strict relaxed.

    price: how much peak/mean is worth giving up to bring all of a layer's load to the nodes of its groups.
    """

    groups: int
    price: float = 0.1
    packed: Packed = field(default_factory=Packed)

    def __post_init__(self) -> None:
        if not 0 <= self.price < np.inf:
            raise ValueError(f"the price of leaving a node must be finite and >= 0; got {self.price}")

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        load_LE = trace.load_LE
        tables = [self.packed.pack(load_LE, topology)]
        if sum(_room_D(topology, _group_size(trace.num_experts, self.groups))) >= self.groups:
            strict = StrictGroups(groups=self.groups, packed=self.packed).pack(load_LE, topology)
            tables += [strict, self._relaxed(strict, load_LE, topology)]
        cost_CL = np.stack([self._cost_L(table, load_LE, topology) for table in tables])
        best = np.stack(tables)[cost_CL.argmin(axis=0), np.arange(trace.layers)]
        made: Provenance = {
            "planner": "packed, priced groups",
            "groups": self.groups,
            "price": self.price,
            "stray": float(stray_L(placements(best), load_LE, topology, self.groups).mean()),
            "seed": self.packed.seed,
        }
        return certified(placements(best), trace, topology, made)

    def _relaxed(self, strict: IntArray, load_LE: FloatArray, topology: Topology) -> IntArray:
        """Swaps that lower the peak by more than they are charged for."""
        layers, num_experts = load_LE.shape
        home_LG = _home_LG(slot_load(strict, load_LE), strict, topology, self.groups, num_experts)
        home_LE = np.repeat(home_LG, num_experts // self.groups, axis=1)
        away_LER = home_LE[:, :, None] != np.array(topology.node_R)
        copies_LE = np.stack([placement.copies_E for placement in placements(strict)])
        # price x mean x (share of the layer's load that a copy carries), in seconds of a rank of speed 1.
        charge_LE = self.price / sum(topology.speed_R) * load_LE / copies_LE
        return refine_swaps(strict, load_LE, topology, np.zeros(layers), charge_LER=charge_LE[:, :, None] * away_LER)

    def _cost_L(self, table: IntArray, load_LE: FloatArray, topology: Topology) -> FloatArray:
        mean_L = load_LE.sum(axis=1) / sum(topology.speed_R)
        cost_L: FloatArray = rank_time(table, load_LE, topology).max(axis=1) / mean_L
        return cost_L + self.price * stray_L(placements(table), load_LE, topology, self.groups)


def stray_L(placement_L: tuple[Placement, ...], load_LE: FloatArray, topology: Topology, groups: int) -> FloatArray:
    """Share of each layer's load that is served away from the node that serves most of its group."""
    share_LRE = np.stack([placement.held_RE / placement.copies_E for placement in placement_L])
    load_LRE = share_LRE * load_LE[:, None]
    layers, ranks, num_experts = load_LRE.shape
    size = _group_size(num_experts, groups)
    load_LRG = load_LRE.reshape(layers, ranks, groups, size).sum(axis=3)
    node_R = np.array(topology.node_R)
    load_LDG = np.stack([load_LRG[:, node_R == node].sum(axis=1) for node in range(topology.nodes)], axis=1)
    stray: FloatArray = 1.0 - load_LDG.max(axis=1).sum(axis=1) / load_LE.sum(axis=1)
    return np.maximum(stray, 0.0)


def _home_LG(load_LRS: FloatArray, expert_LRS: IntArray, topology: Topology, groups: int, num_experts: int) -> IntArray:
    """The node that holds a group, of a strict table."""
    layer_N, rank_N, slot_N = np.nonzero(expert_LRS >= 0)
    home_LG = np.zeros((len(load_LRS), groups), dtype=np.int64)
    home_LG[layer_N, expert_LRS[layer_N, rank_N, slot_N] // (num_experts // groups)] = np.array(topology.node_R)[rank_N]
    return home_LG


def _room_D(topology: Topology, size: int) -> list[int]:
    """Whole groups of that many experts that fit each node."""
    slots_R, node_R = np.array(topology.slots_R), np.array(topology.node_R)
    return [int(slots_R[node_R == node].sum()) // size for node in range(topology.nodes)]


def _group_size(num_experts: int, groups: int) -> int:
    if groups < 1 or num_experts % groups:
        raise ValueError(f"{num_experts} experts do not divide into {groups} groups; use a divisor of {num_experts}")
    return num_experts // groups


def _evenly(room_D: list[int], groups: int) -> tuple[int, ...]:
    """Groups per node: as even as the nodes' room allows."""
    given = [0] * len(room_D)
    for _ in range(groups):
        node = min((n for n, room in enumerate(room_D) if given[n] < room), key=given.__getitem__)
        given[node] += 1
    return tuple(given)
