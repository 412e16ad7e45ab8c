"""Planners that decide in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.plan import EMPTY, Placement
from placement.topology import Topology


@dataclass(frozen=True, kw_only=True)
class RoundRobin:
    """Deal the experts to the ranks like cards, whatever their load; pass over full ranks, leave spare slots empty.

    The baseline, and what a layer does when it is given no placement.
    """

    def place(self, num_experts: int, topology: Topology) -> Placement:
        if num_experts < 1:
            raise ValueError(f"a layer needs at least 1 expert; got {num_experts}")
        if num_experts > topology.slots:
            raise ValueError(
                f"{num_experts} experts do not fit {topology.ranks} ranks with {topology.slots} slots in all; "
                f"use slots >= {-(-num_experts // topology.ranks)} a rank"
            )
        expert_RS = np.full((topology.ranks, max(topology.slots_R)), EMPTY, dtype=np.int64)
        expert = 0
        for slot in range(max(topology.slots_R)):
            for rank, slots in enumerate(topology.slots_R):
                if slot < slots and expert < num_experts:
                    expert_RS[rank, slot] = expert
                    expert += 1
        return Placement(expert_RS=expert_RS)
