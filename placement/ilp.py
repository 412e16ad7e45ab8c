"""Planners by integer programming, layer by layer or over all layers at once: MoETuner's programmes and ExFlow's.

The solver's answer is taken where it beats the heuristic's, and its dual bound where it beats the closed form. Status
says "optimal" only where the bound was met, after a time-out as well as before.

The programmes are imported by whoever solves one: whoever trains needs no solver, and may not have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from placement import cap
from placement.affinity import Affinity, with_hops
from placement.arrays import BoolArray, FloatArray, IntArray
from placement.bounds import ROUNDING, Certificate, peak_bound_L
from placement.capped import Capped
from placement.certify import certified
from placement.greedy import Packed
from placement.metrics import peak_over_mean_L
from placement.packing import placements, table_of
from placement.plan import EMPTY, Placement, Plan, Provenance
from placement.rank_names import flow_LGG, named
from placement.topology import Topology
from placement.trace import LoadTrace


@dataclass(frozen=True, kw_only=True)
class Ilp:
    """Integer programmes for one layer at a time.

    Without a cap, MoETuner: each layer's peak as low as can be, then ranks named so that the slowest pair of ranks is
    fastest, where the trace knows who follows whom. Under a balance_cap, ExFlow: hops as local as can be, each layer
    solved exactly while its neighbours stay.
    seconds: the time limit of all programmes together, shared out evenly.
    """

    seconds: float = 60.0
    balance_cap: float = math.inf
    seed: int = 0

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        if self.balance_cap < math.inf:
            return self._local(trace, topology)
        return self._balanced(trace, topology)

    def _balanced(self, trace: LoadTrace, topology: Topology) -> Plan:
        from placement import programmes

        plan = Packed(seed=self.seed)(trace, topology)
        made: Provenance = {"planner": "ilp", "programme": "balance", "seed": self.seed}
        mean_L = trace.load_LE.sum(axis=1) / sum(topology.speed_R)
        bound_L = peak_bound_L(trace.load_LE, topology)
        naming = trace.follow_LEE is not None and trace.layers > 1 and topology.slots == trace.num_experts
        limit = self.seconds / (trace.layers * (2 if naming else 1))
        placement_L, proved_L = [], []
        for layer, (start, certificate) in enumerate(zip(plan.placement_L, plan.certificate_L, strict=True)):
            if certificate.gap <= ROUNDING:
                placement_L.append(start)
                proved_L.append(0.0)
                continue
            load_E = trace.load_LE[layer] / mean_L[layer]
            solved, held_RE = programmes.balance(load_E, topology, limit, self.seed)
            better = solved.found and _peak(held_RE, load_E, topology) < _peak(start.held_RE, load_E, topology)
            placement_L.append(_placement(held_RE) if better else start)
            # Feasibility tolerances let a solver's bound overshoot by a hair.
            proved_L.append(solved.bound * (1 - 1e-6) if math.isfinite(solved.bound) else 0.0)
        if naming:
            placement_L, made = self._named(placement_L, trace, topology, made)
        planned = certified(placement_L, trace, topology, made)
        value_L = peak_over_mean_L(planned, trace.load_LE, topology)
        return replace(planned, certificate_L=_with_proofs(value_L, bound_L, np.array(proved_L)))

    def _named(
        self, placement_L: list[Placement], trace: LoadTrace, topology: Topology, made: Provenance
    ) -> tuple[list[Placement], Provenance]:
        assert trace.follow_LEE is not None
        group_LE = np.stack([placement.home_E for placement in placement_L])
        flow = flow_LGG(group_LE, trace.follow_LEE, topology.ranks)
        rank_LG, proved = named(flow, topology, self.seconds / 2, self.seed)
        renamed = [
            placements(table_of(rank_G[g][None], topology))[0] for rank_G, g in zip(rank_LG, group_LE, strict=True)
        ]
        return renamed, {**made, "names": proved}

    def _local(self, trace: LoadTrace, topology: Topology) -> Plan:
        """Affinity's plan, then block programmes forth and back until none of them helps."""
        affinity = Affinity(balance_cap=self.balance_cap, seed=self.seed)
        start = affinity(trace, topology)
        made: Provenance = {"planner": "ilp", "programme": "hops", "balance_cap": self.balance_cap, "seed": self.seed}
        made = {**made, "cap": start.provenance["cap"]}
        if trace.layers < 2 or any((placement.copies_E > 1).any() for placement in start.placement_L):
            return with_hops(certified(start.placement_L, trace, topology, made), trace, topology)
        problem = affinity.problem(trace, topology)
        rank_LE = _padded(np.stack([placement.home_E for placement in start.placement_L]), topology)
        blocks, proved = 0, 0
        for _ in range(2):
            before = rank_LE.copy()
            for layer in range(trace.layers):
                solved, rank_LE = self._block(problem, rank_LE, layer, topology)
                blocks, proved = blocks + 1, proved + solved
            if (before == rank_LE).all():
                break
        table = table_of(rank_LE[:, : trace.num_experts], topology)
        placement_L = placements(table)
        kept = cap.kept(table, problem.load_LKE[:, :, : trace.num_experts], topology, self.balance_cap, trace.layer_L)
        made = {**made, "cap": kept, "blocks": blocks, "blocks_optimal": proved}
        return with_hops(certified(placement_L, trace, topology, made), trace, topology)

    def _block(self, problem: Capped, rank_LE: IntArray, layer: int, topology: Topology) -> tuple[bool, IntArray]:
        from placement import programmes

        gain_ER = problem.chain.gain(rank_LE[None], np.array([layer]))[0, 0]
        limit = self.seconds / (2 * len(rank_LE))
        load_KE = problem.load_LKE[layer]
        solved, rank_E = programmes.block(gain_ER, load_KE, topology, self.balance_cap, limit, seed=self.seed)
        tried = rank_LE.copy()
        tried[layer] = rank_E
        if not solved.found or problem.excess_BL(tried[None])[0, layer] > problem.excess_BL(rank_LE[None])[0, layer]:
            return solved.proved, rank_LE
        was_over = problem.excess_BL(rank_LE[None])[0, layer] > 0
        gains = problem.worth_B(tried[None])[0] > problem.worth_B(rank_LE[None])[0] * (1 + ROUNDING)
        return solved.proved, tried if gains or was_over else rank_LE


@dataclass(frozen=True, kw_only=True)
class IlpWhole:
    """ExFlow's programme over all layers at once, on request: compare it with Affinity before you wait for it.

    Affinity's plan stands where the solver finds none better in time.
    """

    seconds: float = 60.0
    balance_cap: float = math.inf
    seed: int = 0

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        from placement import programmes

        affinity = Affinity(balance_cap=self.balance_cap, node_worth=0.0, seed=self.seed)
        start = affinity(trace, topology)
        pair_LEE = trace.follow_LEE
        if pair_LEE is None or trace.layers < 2 or topology.slots > trace.num_experts:
            raise ValueError("the whole programme needs two layers or more, and a slot for each expert and no more")
        problem = affinity.problem(trace, topology)
        solved, rank_LE = programmes.whole(
            pair_LEE, problem.load_LKE, topology, self.balance_cap, self.seconds, seed=self.seed
        )
        if solved.infeasible:
            raise ValueError(f"no placement keeps a balance cap of {self.balance_cap}; raise the cap, or add slots")
        started_LE = np.stack([placement.home_E for placement in start.placement_L])
        kept = not problem.excess_BL(started_LE[None]).any()
        if not kept and not solved.found:
            made: Provenance = {"planner": "ilp", "programme": "whole", "solver": solved.solver, "seed": self.seed}
            made = {**made, "cap": start.provenance["cap"], "hops": "no plan within the cap found in time"}
            return with_hops(certified(start.placement_L, trace, topology, made), trace, topology)
        apart = (1 - float(start.provenance["local"])) * float(pair_LEE.sum()) if kept else math.inf
        better = solved.found and solved.value < apart * (1 - ROUNDING)
        placement_L = placements(table_of(rank_LE, topology)) if better else start.placement_L
        crossing = min(solved.value, apart)
        gap = crossing / solved.bound - 1 if solved.bound > 0 else math.inf
        proved = crossing - solved.bound <= 1e-6 * max(crossing, 1e-9)
        made = {
            "planner": "ilp",
            "programme": "whole",
            "solver": solved.solver,
            "cap": "none" if self.balance_cap == math.inf else "kept",
            "hops": "optimal" if proved else f"feasible, gap {100 * gap:.3g} %",
            "hops_bound": 1 - max(solved.bound, 0.0) / float(pair_LEE.sum()),
            "seed": self.seed,
        }
        return with_hops(certified(placement_L, trace, topology, made), trace, topology)


def _peak(held_RE: IntArray | BoolArray, load_E: FloatArray, topology: Topology) -> float:
    return float((held_RE / held_RE.sum(axis=0) @ load_E / np.array(topology.speed_R)).max())


def _placement(held_RE: IntArray) -> Placement:
    width = int(held_RE.sum(axis=1).max())
    rows = [np.flatnonzero(held_E) for held_E in held_RE]
    return Placement(expert_RS=np.stack([np.pad(row, (0, width - len(row)), constant_values=EMPTY) for row in rows]))


def _padded(rank_LE: IntArray, topology: Topology) -> IntArray:
    """Free slots as experts that nobody chooses, after the others."""
    padded = []
    for rank_E in rank_LE:
        free_R = np.array(topology.slots_R) - np.bincount(rank_E, minlength=topology.ranks)
        padded.append(np.concatenate([rank_E, np.repeat(np.arange(topology.ranks), free_R)]))
    return np.stack(padded)


def _with_proofs(value_L: FloatArray, bound_L: FloatArray, proved_L: FloatArray) -> tuple[Certificate, ...]:
    """The better of the closed form and the solver's bound, and which of the two it is."""
    certificates = []
    for value, closed, proved in zip(value_L.tolist(), bound_L.tolist(), proved_L.tolist(), strict=True):
        bound, method = (proved, "solver's dual bound") if proved > closed else (closed, "closed form")
        certificates.append(Certificate(bound=min(bound, value), gap=max(value / bound - 1, 0.0), method=method))
    return tuple(certificates)
