"""Failure domains: what fails together. A node; a rank, where there is one node only."""

from __future__ import annotations

import numpy as np

from placement.arrays import IntArray
from placement.plan import Placement
from placement.topology import Topology


def domains(topology: Topology) -> tuple[int, ...]:
    """The failure domain of each rank."""
    return topology.node_R if topology.nodes > 1 else tuple(range(topology.ranks))


def domains_E(placement: Placement, topology: Topology) -> IntArray:
    """In how many failure domains each expert lives."""
    domain_R = np.array(domains(topology))
    held_DE = np.stack([placement.held_RE[domain_R == domain].any(axis=0) for domain in range(domain_R.max() + 1)])
    count_E: IntArray = held_DE.sum(axis=0)
    return count_E
