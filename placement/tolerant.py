"""Tolerant: every expert in two failure domains at least, so that losing one of them loses no expert.

The experts go to the domains first, as if each was one
large rank, so that no copies share one; then every domain packs what it got onto its ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.arrays import FloatArray, IntArray
from placement.certify import certified
from placement.copies import apportion, copies_fit
from placement.domains import domains, domains_E
from placement.greedy import Packed
from placement.packing import free_slots, held_LRE, pack, placements
from placement.plan import Plan, Provenance
from placement.refine import rank_time, refine_swaps
from placement.topology import Topology
from placement.trace import LoadTrace


@dataclass(frozen=True, kw_only=True)
class Tolerant:
    """As balanced as can be with copies of every expert in failures + 1 domains. Layers that Packed makes so by itself
    are kept where they are better."""

    failures: int = 1
    packed: Packed = field(default_factory=Packed)

    def __post_init__(self) -> None:
        if self.failures < 0:
            raise ValueError(f"failures={self.failures}; use the number of failure domains that may be lost")

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        load_LE = trace.load_LE
        apart, flat = self._apart(load_LE, topology), self.packed.pack(load_LE, topology)
        peak_L, flat_peak_L = (rank_time(table, load_LE, topology).max(axis=1) for table in (apart, flat))
        safe_L = np.array([domains_E(each, topology).min() > self.failures for each in placements(flat)])
        kept = np.where((safe_L & (flat_peak_L <= peak_L))[:, None, None], flat, apart)
        made: Provenance = {"planner": "packed, tolerant", "tolerates": self.failures, "seed": self.packed.seed}
        return certified(placements(kept), trace, topology, made)

    def _apart(self, load_LE: FloatArray, topology: Topology) -> IntArray:
        """expert_LRS with the copies of each expert in different domains, as many as there is room for."""
        num_experts = load_LE.shape[1]
        domain_R, slots_R = np.array(domains(topology)), np.array(topology.slots_R)
        ranks_D = [np.flatnonzero(domain_R == domain) for domain in range(domain_R.max() + 1)]
        whole = Topology(
            slots_R=tuple(min(int(slots_R[rank_N].sum()), num_experts) for rank_N in ranks_D),
            ranks_per_node=1,
            speed_R=tuple(float(np.array(topology.speed_R)[rank_N].sum()) for rank_N in ranks_D),
        )
        if whole.slots < (self.failures + 1) * num_experts or whole.ranks <= self.failures:
            raise ValueError(
                f"{num_experts} experts in {self.failures + 1} failure domains each need "
                f"{(self.failures + 1) * num_experts} slots; {whole.ranks} domains have room for {whole.slots}"
            )
        on_LDS = np.sort(pack(self._copies(load_LE, whole), load_LE[:, None], whole), axis=2)
        table = free_slots(len(load_LE), topology)
        packed = replace(self.packed, searched=0)  # a search within each of many domains would not be worth its time
        for part in _parts(ranks_D, on_LDS, topology):
            part.write(table, packed.pack(part.of(load_LE), part.topology))
        copies_LE = np.stack([placement.copies_E for placement in placements(table)])
        for part in _parts(ranks_D, on_LDS, topology):  # again, now that all copies of each expert are known
            local = part.read(table)
            here_LX = held_LRE(local, part.expert_LX.shape[1])[:, :, :-1].sum(axis=1)
            load_LX = part.of(load_LE) / part.of(copies_LE) * here_LX
            part.write(table, refine_swaps(local, load_LX, part.topology, np.zeros(len(load_LX))))
        return table

    def _copies(self, load_LE: FloatArray, whole: Topology) -> IntArray:
        """Balance asks for some numbers of copies, tolerance for a least one; the most copied give up what lacks."""
        copies_LE = np.maximum(apportion(load_LE, whole), self.failures + 1)
        for copies_E, load_E in zip(copies_LE, load_LE, strict=True):
            while copies_E.sum() > whole.slots or not copies_fit(copies_E[None], whole):
                spare_E = copies_E > self.failures + 1
                copies_E[np.where(spare_E, load_E / np.maximum(copies_E - 1, 1), np.inf).argmin()] -= 1
        return copies_LE


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A domain as a machine of its own, in the layers in which it holds as many experts. expert_LX: which, ascending;
    in the part they are called 0, 1, ..."""

    layer_L: IntArray
    rank_N: IntArray
    expert_LX: IntArray
    topology: Topology

    def of(self, each_LE: NDArray[Any]) -> NDArray[Any]:
        """A table of all experts -> of the part's."""
        return np.take_along_axis(each_LE[self.layer_L], self.expert_LX, axis=1)

    def read(self, table: IntArray) -> IntArray:
        there = table[self.layer_L[:, None], self.rank_N]
        number = (there[:, :, :, None] == self.expert_LX[:, None, None]).argmax(axis=3)
        local: IntArray = np.where(there >= 0, number, there)
        return local

    def write(self, table: IntArray, local: IntArray) -> None:
        named = self.expert_LX[np.arange(len(local))[:, None, None], np.maximum(local, 0)]
        table[self.layer_L[:, None], self.rank_N, : local.shape[2]] = np.where(local >= 0, named, local)


def _parts(ranks_D: list[IntArray], on_LDS: IntArray, topology: Topology) -> Iterator[_Part]:
    """on_LDS: the experts of each domain, behind the slots without one."""
    for domain, rank_N in enumerate(ranks_D):
        machine = replace(
            topology,
            slots_R=tuple(topology.slots_R[rank] for rank in rank_N),
            speed_R=tuple(topology.speed_R[rank] for rank in rank_N),
            memory_R=(),
            expert_bytes=0,
        )
        held_L = (on_LDS[:, domain] >= 0).sum(axis=1)
        for held in np.unique(held_L[held_L > 0]).tolist():
            layer_L = np.flatnonzero(held_L == held)
            expert_LX = on_LDS[layer_L, domain, -held:]
            yield _Part(layer_L=layer_L, rank_N=rank_N, expert_LX=expert_LX, topology=machine)
