"""Which rank takes which part of a new plan: names for its ranks under which fewest bytes move.

A planner's ranks are alike until somebody is told to be the first: any rank of the same slots and speed may take over
any other's part, and the plan is as good. The best names are an assignment problem, solved exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.fewest import on_ranks
from placement.plan import Placement, Plan
from placement.topology import Topology
from placement.transport import transport

# What a plan claims of nodes, or of a layer and the next, and other names would break.
CLAIMS = frozenset({"groups", "tolerates", "local", "hops"})
UNLIKE = -1e6


def rename(start: Plan, target: Plan, byte_L: Sequence[int]) -> Plan:
    """Fewest bytes among the names that keep what the plan claims: every layer by itself; but one naming for all
    layers, and nodes whole, where the plan was made with nodes or hops in mind."""
    hops = any(certificate.local is not None for certificate in target.certificate_L)
    bound = hops or not CLAIMS.isdisjoint(target.provenance)
    return rename_nodes(start, target, byte_L) if bound else rename_ranks(start, target, byte_L)


def as_given(start: Plan, target: Plan, byte_L: Sequence[int]) -> Plan:
    """The target's own names."""
    return target


def rename_ranks(start: Plan, target: Plan, byte_L: Sequence[int]) -> Plan:
    """Fewest bytes of all: each layer by itself, whichever nodes its ranks are on."""
    unlike_RR = _unlike(_kinds(machine_of(target)))
    pairs = zip(start.placement_L, target.placement_L, strict=True)
    return _renamed(target, [_assigned(_overlap(old, new), unlike_RR) for old, new in pairs])


def rename_nodes(start: Plan, target: Plan, byte_L: Sequence[int]) -> Plan:
    """One naming for all layers; ranks of a node stay together. What holds of nodes and hops before holds after."""
    topology = machine_of(target)
    pairs = zip(start.placement_L, target.placement_L, byte_L, strict=True)
    overlap_RR = np.sum([num_bytes / max(byte_L) * _overlap(old, new) for old, new, num_bytes in pairs], axis=0)
    unlike_RR, node_R = _unlike(_kinds(topology)), np.array(topology.node_R)
    ranks_D = [np.flatnonzero(node_R == node) for node in range(topology.nodes)]
    gain_DD = np.full((topology.nodes, topology.nodes), UNLIKE)
    inside: dict[tuple[int, int], IntArray] = {}
    kinds = _kinds(topology)
    for one, new_N in enumerate(ranks_D):
        for other, old_N in enumerate(ranks_D):
            if sorted(kinds[rank] for rank in new_N) == sorted(kinds[rank] for rank in old_N):
                part = np.ix_(new_N, old_N)
                inside[one, other] = _assigned(overlap_RR[part], unlike_RR[part])
                gain_DD[one, other] = overlap_RR[new_N, old_N[inside[one, other]]].sum()
    goes_D = transport(gain_DD[None], (1,) * topology.nodes)[0].tolist()
    goes_R = np.empty(topology.ranks, dtype=np.int64)
    for one, other in enumerate(goes_D):
        goes_R[ranks_D[one]] = ranks_D[other][inside[one, other]]
    return _renamed(target, [goes_R] * len(target.placement_L))


def machine_of(plan: Plan) -> Topology:
    """The plan's own; where it names none, one node of ranks with as many slots as its widest layer."""
    slots = max(placement.expert_RS.shape[1] for placement in plan.placement_L)
    return plan.topology or Topology.even(ranks=plan.ranks, slots=slots, ranks_per_node=plan.ranks)


def _kinds(topology: Topology) -> list[tuple[int, float]]:
    return list(zip(topology.slots_R, topology.speed_R, strict=True))


def _unlike(kinds: list[tuple[int, float]]) -> FloatArray:
    return np.array([[UNLIKE if one != other else 0.0 for other in kinds] for one in kinds])


def _overlap(old: Placement, new: Placement) -> FloatArray:
    """overlap[n, r]: experts of the part n of the new placement that rank r holds."""
    return new.held_RE.astype(np.float64) @ on_ranks(old, new.ranks).T.astype(np.float64)


def _assigned(overlap_RR: FloatArray, unlike_RR: FloatArray) -> IntArray:
    goes_R: IntArray = transport((overlap_RR + unlike_RR)[None], (1,) * len(overlap_RR))[0]
    return goes_R


def _renamed(plan: Plan, goes_LR: Sequence[IntArray]) -> Plan:
    placements = []
    for placement, goes_R in zip(plan.placement_L, goes_LR, strict=True):
        expert_RS = np.empty_like(placement.expert_RS)
        expert_RS[goes_R] = placement.expert_RS
        placements.append(Placement(expert_RS=expert_RS))
    return replace(plan, placement_L=tuple(placements))
