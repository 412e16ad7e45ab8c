"""Bringing a layer under a cap in every scenario: a few changes where they do, so that most experts stay put."""

from __future__ import annotations

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.bounds import ROUNDING
from placement.greedy import Packed
from placement.joint import hand_over
from placement.packing import placements, working_table
from placement.rebalance import relabelled
from placement.refine import LEAST
from placement.robust import Robust, Swaps, scenario_peaks
from placement.topology import Topology


def over_cap(expert_LRS: IntArray, load_LKE: FloatArray, topology: Topology, cap: float) -> list[int]:
    """The layers that some scenario takes above the cap; loads are scaled as by `Robust.loads`."""
    over_L = scenario_peaks(expert_LRS, load_LKE, topology).max(axis=1) > cap * (1 + ROUNDING)
    return [layer for layer, over in enumerate(over_L.tolist()) if over]


def repaired(expert_LRS: IntArray, load_LKE: FloatArray, topology: Topology, cap: float, seed: int) -> IntArray:
    """Layers above the cap hand spare slots to busy experts, and swap; as the last resort they are packed anew.

    Ranks of a layer packed anew are relabelled, to keep what they held. Where that is above the cap as well, the lower
    peak is taken.
    """
    table = expert_LRS.copy()
    for layer in over_cap(table, load_LKE, topology, cap):
        table[layer] = _stepped(table[layer], load_LKE[layer], topology, cap)
    left = over_cap(table, load_LKE, topology, cap)
    if not left:
        return table
    packed = _packed(load_LKE[left], topology, seed)
    pairs = zip(placements(expert_LRS[left]), placements(packed), strict=True)
    anew = working_table(tuple(relabelled(start, target, topology) for start, target in pairs), topology)
    old_A, new_A = (scenario_peaks(t, load_LKE[left], topology).max(axis=1) for t in (table[left], anew))
    table[left] = np.where((new_A < old_A)[:, None, None], anew, table[left])
    return table


def _packed(load_LKE: FloatArray, topology: Topology, seed: int) -> IntArray:
    if load_LKE.shape[1] == 1:
        return Packed(seed=seed).pack(load_LKE[:, 0], topology)
    return Robust(tail=0.0, seed=seed).pack(load_LKE, topology)


def _stepped(expert_RS: IntArray, load_KE: FloatArray, topology: Topology, cap: float) -> IntArray:
    """Each step lowers the peak of the worst scenario, until the cap is kept or none does."""
    table = expert_RS[None].copy()
    while over_cap(table, load_KE[None], topology, cap):
        if hand_over(table[0], load_KE, topology, 0.0, LEAST):
            continue
        swapped = Swaps(table, load_KE[None], topology, 0.0).run(1)
        if (swapped == table).all():
            break
        table = swapped
    stepped: IntArray = table[0]
    return stepped
