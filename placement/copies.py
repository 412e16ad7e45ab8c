"""How many copies each expert gets: the counts that make the busiest copy least busy, in closed form.

Giving copies one by one to the expert whose copies are busiest takes the largest of all quotients load_e / k in turn.
So the counts follow from one sort: an expert gets an extra copy for each of its quotients among the largest.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.topology import Topology


def thinning_C(topology: Topology) -> FloatArray:
    """Best possible time of the busiest copy of a unit of load cut in 1, 2, ... copies, each on a rank of its own.

    1/c for equal ranks. With speeds the slowest of c ranks is at best the c-th fastest; entry c is the best of up to c.
    """
    speeds = sorted((s for s, slots in zip(topology.speed_R, topology.slots_R, strict=True) if slots), reverse=True)
    best_C: FloatArray = np.minimum.accumulate(1.0 / (np.arange(1, len(speeds) + 1) * np.array(speeds)))
    return best_C


def require_room(num_experts: int, topology: Topology) -> None:
    """What every planner says of a machine that is too small, whether slots or memory make it so."""
    if num_experts <= topology.slots:
        return
    short = f"{num_experts} experts do not fit {topology.ranks} ranks with {topology.slots} slots in all"
    if topology.memory_R:
        raise ValueError(
            f"{short}, where no rank has more slots than its memory holds experts of {topology.expert_bytes} bytes; "
            f"use more ranks, memory or slots"
        )
    raise ValueError(f"{short}; use slots >= {-(-num_experts // topology.ranks)} a rank")


def apportion(load_LE: FloatArray, topology: Topology) -> IntArray:
    """copies_LE: at least 1 each, at most one a rank, as many as there are slots. Ties go to the lowest expert."""
    num_experts = load_LE.shape[1]
    require_room(num_experts, topology)
    ranks = sum(slots > 0 for slots in topology.slots_R)
    for most in range(ranks, 0, -1):
        copies_LE = cheapest_counts(load_LE, min(topology.slots, most * num_experts), thinning_C(topology)[:most])
        if copies_fit(copies_LE, topology):
            return copies_LE
    raise AssertionError("single copies always fit where there are as many slots as experts")


def cheapest_counts(load_LE: FloatArray, slots: int, best_C: FloatArray) -> IntArray:
    """copies_LE that make the busiest copy least busy, whatever the ranks; slots in all, len(best_C) copies at most."""
    layers, num_experts = load_LE.shape
    copies_LE = np.ones((layers, num_experts), dtype=np.int64)
    extra = slots - num_experts
    steps = min(extra, len(best_C) - 1)
    if not steps:
        return copies_LE
    # The largest quotients belong to the heaviest experts: as many as there are extra copies to give, or to take.
    heaviest = min(num_experts, max(extra, -(-extra // (len(best_C) - 1))))
    expert_LH = np.sort(np.argsort(-load_LE, axis=1, kind="stable")[:, :heaviest], axis=1)
    quotient_LN = (np.take_along_axis(load_LE, expert_LH, axis=1)[:, :, None] * best_C[:steps]).reshape(layers, -1)
    taken_LN = np.argsort(-quotient_LN, axis=1, kind="stable")[:, :extra]
    layer_N = np.repeat(np.arange(layers), taken_LN.shape[1])
    np.add.at(copies_LE, (layer_N, expert_LH[layer_N, taken_LN.ravel() // steps]), 1)
    return copies_LE


def copies_fit(copies_LE: IntArray, topology: Topology) -> bool:
    """Whether copies can sit on distinct ranks: any k experts have at most min(slots, k) copies on each rank."""
    if len(set(topology.slots_R)) == 1:
        return True
    slots_R, k_E = np.array(topology.slots_R), np.arange(1, copies_LE.shape[1] + 1)
    room_E = np.minimum(slots_R[None], k_E[:, None]).sum(axis=1)
    wanted_LE = np.cumsum(-np.sort(-copies_LE, axis=1), axis=1)
    return bool((wanted_LE <= room_E).all())
