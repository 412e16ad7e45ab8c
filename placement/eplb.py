"""DeepSeek's balancer as a drop-in: the same question, the same answer, as `eplb.rebalance_experts` gives.

For engines that expect exactly that plan. It may put an expert twice on a rank, needs slots that divide by the ranks,
and forgets the plan before it; Packed does better on every count, and `formats.deepseek.write_triple` writes any Plan
in this form. Decisions are made in float32, as there; ties go to the lowest index, where the original leaves them to
its sort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from placement.arrays import IntArray

Load = NDArray[np.float32]


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Any, Any, Any]:
    """weight [layers, experts] -> (phy2log [layers, slots], log2phy [layers, experts, most copies], logcnt).

    Groups are kept on one node each where they divide by the nodes; otherwise nodes and groups are ignored. -1 fills
    log2phy. A torch tensor is answered with tensors, anything else with numpy arrays.
    """
    load_LE = np.asarray(weight.cpu() if hasattr(weight, "cpu") else weight).astype(np.float32)
    if load_LE.ndim != 2:
        raise ValueError(f"weight must be [layers, experts]; got shape {load_LE.shape}")
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    _require_divisible(load_LE.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    plans = [_plan(load_E, num_replicas, num_groups, num_nodes, num_gpus) for load_E in load_LE]
    expert_LN = np.stack([expert_N for expert_N, _ in plans])
    copy_LN = np.stack([copy_N for _, copy_N in plans])
    layers, experts = load_LE.shape
    copies_LE = np.stack([np.bincount(expert_N, minlength=experts) for expert_N in expert_LN])
    slot_LEC = np.full((layers, experts, int(copies_LE.max())), -1, dtype=np.int64)
    slot_LEC[np.arange(layers)[:, None], expert_LN, copy_LN] = np.arange(num_replicas)
    tables = (expert_LN, slot_LEC, copies_LE)
    if not hasattr(weight, "cpu"):
        return tables
    import torch

    phy2log, log2phy, logcnt = (torch.from_numpy(table) for table in tables)
    return phy2log, log2phy, logcnt


def _require_divisible(experts: int, slots: int, groups: int, nodes: int, ranks: int) -> None:
    for what, of, by, many in (
        ("num_gpus", "num_nodes", nodes, ranks),
        ("num_replicas", "num_gpus", ranks, slots),
        ("the number of experts", "num_groups", groups, experts),
    ):
        if by < 1 or many % by:
            raise ValueError(f"{what} ({many}) must be a multiple of {of} ({by}); Packed takes any numbers")
    if slots < experts:
        raise ValueError(f"num_replicas ({slots}) must be at least the number of experts ({experts})")


def _plan(load_E: Load, slots: int, groups: int, nodes: int, ranks: int) -> tuple[IntArray, IntArray]:
    """One layer: the expert in each slot, and which of its copies that is."""
    group_size = len(load_E) // groups
    group_load = load_E.reshape(groups, group_size).sum(axis=1, dtype=np.float32)
    seat_G = _seats(group_load, nodes)
    expert_N, copy_N = np.empty(slots, dtype=np.int64), np.empty(slots, dtype=np.int64)
    per_node = slots // nodes
    for node in range(nodes):
        seated = np.argsort(seat_G)[node * (groups // nodes) : (node + 1) * (groups // nodes)]
        local_E = (seated[:, None] * group_size + np.arange(group_size)).ravel()
        expert, copy = _copied(load_E[local_E], per_node)
        each = load_E[local_E] / np.bincount(expert).astype(np.float32)
        slot = node * per_node + _seats(each[expert], ranks // nodes)
        expert_N[slot], copy_N[slot] = local_E[expert], copy
    return expert_N, copy_N


def _seats(weight_N: Load, packs: int) -> IntArray:
    """Heaviest first into the lightest pack with room: the seat (pack x size + place in it) of each item."""
    size = len(weight_N) // packs
    if size == 1:
        return np.arange(packs)
    seat_N = np.empty(len(weight_N), dtype=np.int64)
    filled, carried = np.zeros(packs, dtype=np.int64), np.zeros(packs, dtype=np.float32)
    for item in np.argsort(-weight_N, kind="stable").tolist():
        pack = int(np.where(filled < size, carried, np.inf).argmin())
        seat_N[item] = pack * size + filled[pack]
        filled[pack] += 1
        carried[pack] += weight_N[item]
    return seat_N


def _copied(load_E: Load, slots: int) -> tuple[IntArray, IntArray]:
    """Each expert once, then copy by copy to whoever's copies are busiest: (expert, which of its copies)."""
    copies_E = np.ones(len(load_E), dtype=np.int64)
    expert_N, copy_N = list(range(len(load_E))), [0] * len(load_E)
    for _ in range(slots - len(load_E)):
        busiest = int((load_E / copies_E.astype(np.float32)).argmax())
        expert_N.append(busiest)
        copy_N.append(int(copies_E[busiest]))
        copies_E[busiest] += 1
    return np.array(expert_N), np.array(copy_N)
