"""More slots must not hurt: a layer far from its bound is also planned for fewer slots, and as cards are dealt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.packing import free_slots
from placement.plan import EMPTY
from placement.topology import Topology

EMPTY_WORTH = 5e-3


def fewer(topology: Topology, num_experts: int) -> Iterator[Topology]:
    """The same machine with its roomiest ranks cut to one slot less, again and again, while the experts fit."""
    for most in range(max(topology.slots_R) - 1, 0, -1):
        smaller = replace(topology, slots_R=tuple(min(slots, most) for slots in topology.slots_R))
        if smaller.slots < num_experts:
            return
        yield smaller


def widened(expert_LRS: IntArray, topology: Topology) -> IntArray:
    """The same table with the slots that the larger machine has besides."""
    table = free_slots(len(expert_LRS), topology)
    part = table[:, :, : expert_LRS.shape[2]]
    part[expert_LRS >= 0] = expert_LRS[expert_LRS >= 0]
    return table


def keep_better(
    table: IntArray,
    other_LRS: IntArray,
    layer_A: IntArray,
    value: Callable[[IntArray, IntArray], FloatArray],
    margin: float = 0.0,
) -> None:
    """In place: of the layers listed, those that the other table (of these alone) serves better, by a share at least.

    Engines want full tables: where ranks are alike, EMPTY_WORTH is what an empty slot must be worth.
    """
    old_A, new_A = value(table[layer_A], layer_A), value(other_LRS, layer_A)
    better = new_A < old_A * (1 - margin)
    table[layer_A[better]] = other_LRS[better]


def dealt(layers: int, num_experts: int, topology: Topology) -> IntArray:
    """The working table of experts dealt like cards."""
    table = free_slots(1, topology)
    slot_N, rank_N = np.nonzero(table[0].T == EMPTY)
    table[0, rank_N[:num_experts], slot_N[:num_experts]] = np.arange(num_experts)
    return np.repeat(table, layers, axis=0)
