"""Topology: the machine as a planner sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Link:
    """What it costs to move bytes between two ranks: seconds = latency + bytes / bandwidth."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (0 <= self.latency < math.inf and 0 < self.bandwidth < math.inf):
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
    """How many experts each rank can hold, how fast it computes, which ranks share a node, and what the links cost.

    slots_R: expert slots of each rank; ranks may differ, and a rank may have none.
    speed_R: rows a rank computes in the time that a rank of speed 1 computes one; all 1 where not given.
    memory_R: bytes each rank can spend on the experts of one layer, of expert_bytes each; empty and 0 where memory does
    not bind. slots_R is cut here to what memory holds, so that whoever reads slots_R, every planner, keeps to it.
    """

    slots_R: tuple[int, ...]
    ranks_per_node: int
    within_node: Link = NVLINK
    across_nodes: Link = INFINIBAND
    speed_R: tuple[float, ...] = ()
    memory_R: tuple[int, ...] = ()
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots_R", tuple(int(slots) for slots in self.slots_R))
        if not self.slots_R or min(self.slots_R) < 0:
            raise ValueError(f"slots_R needs one number >= 0 for each rank; got {self.slots_R}")
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be at least 1; got {self.ranks_per_node}")
        speed_R = tuple(float(speed) for speed in self.speed_R) or (1.0,) * len(self.slots_R)
        object.__setattr__(self, "speed_R", speed_R)
        object.__setattr__(self, "memory_R", tuple(int(memory) for memory in self.memory_R))
        object.__setattr__(self, "expert_bytes", int(self.expert_bytes))
        if len(speed_R) != self.ranks or not all(0 < speed < math.inf for speed in speed_R):
            raise ValueError(f"speed_R needs one number > 0 for each of {self.ranks} ranks; got {self.speed_R}")
        if self.memory_R and (len(self.memory_R) != self.ranks or min(self.memory_R) < 0):
            raise ValueError(f"memory_R needs one number >= 0 for each of {self.ranks} ranks; got {self.memory_R}")
        if bool(self.memory_R) != (self.expert_bytes > 0) or self.expert_bytes < 0:
            raise ValueError(
                f"memory_R and expert_bytes, at least 1, need each other: how much there is, and how much an expert "
                f"takes; got {self.memory_R} and {self.expert_bytes}"
            )
        if self.memory_R:
            fits_R = tuple(min(pair) for pair in zip(self.slots_R, self.held_R, strict=True))
            object.__setattr__(self, "slots_R", fits_R)

    @classmethod
    def even(cls, *, ranks: int, slots: int, ranks_per_node: int) -> Self:
        """Every rank has the same number of slots."""
        if ranks < 1:
            raise ValueError(f"a topology needs at least 1 rank; got {ranks}")
        return cls(slots_R=(slots,) * ranks, ranks_per_node=ranks_per_node)

    @classmethod
    def fitting(cls, *, num_experts: int, ranks: int, ranks_per_node: int, spare: int = 0) -> Self:
        """Just enough slots for one copy of each expert, and so many to spare; the first ranks take one more where they
        do not divide."""
        if ranks < 1:
            raise ValueError(f"a topology needs at least 1 rank; got {ranks}")
        if num_experts < 0 or spare < 0:
            raise ValueError(f"num_experts and spare slots must be >= 0; got {num_experts} and {spare}")
        few, more = divmod(num_experts + spare, ranks)
        return cls(slots_R=tuple(few + (rank < more) for rank in range(ranks)), ranks_per_node=ranks_per_node)

    def fields(self) -> dict[str, Any]:
        """Plain values for JSON; read takes them back."""
        return asdict(self)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        return cls(
            slots_R=tuple(fields["slots_R"]),
            ranks_per_node=int(fields["ranks_per_node"]),
            within_node=Link(**fields["within_node"]),
            across_nodes=Link(**fields["across_nodes"]),
            speed_R=tuple(fields["speed_R"]),
            memory_R=tuple(fields["memory_R"]),
            expert_bytes=int(fields.get("expert_bytes", 0)),
        )

    @property
    def ranks(self) -> int:
        return len(self.slots_R)

    @property
    def held_R(self) -> tuple[int, ...]:
        """The experts that each rank's memory holds; empty where memory does not bind."""
        return tuple(memory // self.expert_bytes for memory in self.memory_R)

    @property
    def slots(self) -> int:
        """All slots together."""
        return sum(self.slots_R)

    @property
    def uniform(self) -> bool:
        """Ranks are alike in slots and speed."""
        return len(set(zip(self.slots_R, self.speed_R, strict=True))) == 1

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
