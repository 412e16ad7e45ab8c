"""Topology: the machine as a planner sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Link:
    """What it costs to move bytes between two ranks: seconds = latency + bytes / bandwidth."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.latency < 0 or self.bandwidth <= 0:
            raise ValueError(
                f"a Link needs latency >= 0 s and bandwidth > 0 bytes/s; got {self.latency} and {self.bandwidth}"
            )

    def seconds(self, num_bytes: float) -> float:
        return self.latency + num_bytes / self.bandwidth


# Orders of magnitude of today's clusters, one direction, per rank. Measure your own before you trust a plan's seconds.
NVLINK = Link(latency=5e-6, bandwidth=400e9)
INFINIBAND = Link(latency=10e-6, bandwidth=50e9)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How many experts each rank can hold, which ranks share a node, and what the links cost.

    slots_R: expert slots of each rank; ranks may differ, and a rank may have none.
    """

    slots_R: tuple[int, ...]
    ranks_per_node: int
    within_node: Link = NVLINK
    across_nodes: Link = INFINIBAND

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots_R", tuple(int(slots) for slots in self.slots_R))
        if not self.slots_R or min(self.slots_R) < 0:
            raise ValueError(f"slots_R needs one number >= 0 for each rank; got {self.slots_R}")
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be at least 1; got {self.ranks_per_node}")

    @classmethod
    def even(cls, *, ranks: int, slots: int, ranks_per_node: int) -> Self:
        """Every rank has the same number of slots."""
        if ranks < 1:
            raise ValueError(f"a topology needs at least 1 rank; got {ranks}")
        return cls(slots_R=(slots,) * ranks, ranks_per_node=ranks_per_node)

    @classmethod
    def fitting(cls, *, num_experts: int, ranks: int, ranks_per_node: int) -> Self:
        """Just enough slots for one copy of each expert; the first ranks take one more where it does not divide."""
        if ranks < 1:
            raise ValueError(f"a topology needs at least 1 rank; got {ranks}")
        few, more = divmod(num_experts, ranks)
        return cls(slots_R=tuple(few + (rank < more) for rank in range(ranks)), ranks_per_node=ranks_per_node)

    @property
    def ranks(self) -> int:
        return len(self.slots_R)

    @property
    def slots(self) -> int:
        """All slots together."""
        return sum(self.slots_R)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    @property
    def node_R(self) -> tuple[int, ...]:
        """The node of each rank; the last node may be short of ranks."""
        return tuple(rank // self.ranks_per_node for rank in range(self.ranks))

    def link(self, source: int, destination: int) -> Link:
        node_R: Sequence[int] = self.node_R
        return self.within_node if node_R[source] == node_R[destination] else self.across_nodes
