"""LeastLoaded: when a rank has more rows than its share, some of its experts visit ranks that have fewer.

Rows can be split at will, so a peak of ceil(rows / ranks) is always within reach; the art is to reach it with few
visits, because a visit moves a whole expert. Only overloaded ranks export. They give their biggest experts first, to
the receiver whose room fits best, copies that already live elsewhere before any visit.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from placement import Placement
from routing.assigner import at_home
from routing.assignment import Assignment
from routing.native import DECIDERS, address, takes

MOST_HEADROOM = 1e6

Move = tuple[int, int, int, int]  # expert, lender, borrower, rows
Receiver = Callable[[int, int], tuple[int, int] | None]  # lender, rows -> borrower, rows it takes


class Worth(Protocol):
    def __call__(self, relief: int, visits: Sequence[tuple[int, int]]) -> bool:
        """relief: rows that a proposal takes off the busiest rank. visits: (lender, borrower) of each. Does it pay?"""


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """A proposal pays if the rows it takes off the busiest rank exceed the rows that could be computed while it moves.

    rows: what one visit costs. Moving an expert of P parameters of b bytes takes P*b / bandwidth seconds, computing a
    row takes 2P / flops, so one visit costs m* = b * flops / (2 * bandwidth) rows, whatever the expert's size.
    (Training moves its gradient too, and computes three times as much: about the same.) In bf16 at 700 TFLOP/s that is
    1750 rows over 400 GB/s and 14000 over 50 GB/s. Ranks move at once, so the one with most visits counts.
    """

    rows: float = 0.0

    def __post_init__(self) -> None:
        if not self.rows >= 0:
            raise ValueError(f"a visit cannot cost {self.rows} rows; use rows >= 0")

    @classmethod
    def of(cls, *, flops: float, bandwidth: float, bytes_per_weight: int = 2) -> Self:
        """flops: of a rank's matmuls, per second. bandwidth: of its link, in bytes per second."""
        if flops <= 0 or bandwidth <= 0 or bytes_per_weight <= 0:
            raise ValueError(
                f"flops, bandwidth and bytes_per_weight must exceed 0; got {flops}, {bandwidth} and {bytes_per_weight}"
            )
        return cls(rows=bytes_per_weight * flops / (2 * bandwidth))

    def __call__(self, relief: int, visits: Sequence[tuple[int, int]]) -> bool:
        visits_R = Counter(rank for visit in visits for rank in visit)
        return relief > self.rows * max(visits_R.values(), default=0)


@dataclass(frozen=True, kw_only=True)
class LeastLoaded:
    """No rank computes more than ceil(headroom * rows / ranks) + min_chunk rows, unless the plan is not worth it.

    headroom: how far above the mean a rank may stay, >= 1; more headroom, fewer visits. min_chunk: a visit brings at
    least this many rows, or all that home has left of an expert; an excess below it stays at home. node_R: the node of
    each rank, to borrow within the lender's node first; empty means one node. worth: whether a plan pays for its
    visits; by default they are taken to be free, so tell it your machine with BreakEven.of(...).
    """

    headroom: float = 1.05
    min_chunk: int = 1
    node_R: tuple[int, ...] = ()
    worth: Worth = BreakEven()

    def __post_init__(self) -> None:
        if not 1.0 <= self.headroom <= MOST_HEADROOM:
            raise ValueError(
                f"headroom={self.headroom}; a multiple of the mean load: use 1 <= headroom <= {MOST_HEADROOM:g}"
            )
        if self.min_chunk < 1:
            raise ValueError(f"min_chunk={self.min_chunk}; a visit brings at least 1 row")
        object.__setattr__(self, "node_R", tuple(int(node) for node in self.node_R))

    def capacity(self, num_rows: int, ranks: int) -> int:
        return math.ceil(self.headroom * num_rows / ranks)

    def __call__(self, count_RE: NDArray[np.int64], placement: Placement) -> Assignment:
        ranks = len(count_RE)
        if self.node_R and len(self.node_R) != ranks:
            raise ValueError(f"node_R names the nodes of {len(self.node_R)} ranks, but the group has {ranks}")
        if count_RE.shape != placement.held_RE.shape or ranks == 1:
            return at_home(count_RE, count_RE.sum(axis=0), placement)
        if (compiled_RE := self._compiled(count_RE, placement)) is not None:
            return Assignment(count_RE=count_RE, quota_RE=compiled_RE)
        load_E, home_E = count_RE.sum(axis=0), placement.home_E
        home_R = np.bincount(home_E, load_E, minlength=ranks).astype(np.int64).tolist()
        capacity, peak = self.capacity(sum(home_R), ranks), max(home_R)
        if peak - capacity < self.min_chunk:
            return at_home(count_RE, load_E, placement)
        spill = _Spill([capacity - rows for rows in home_R], self.node_R or (0,) * ranks, self.min_chunk)
        moves = spill.moves(load_E, placement)
        visits = {(expert, lender, borrower) for expert, lender, borrower, _ in moves}
        if placement.slots > placement.num_experts:
            visits = {visit for visit in visits if not placement.held_RE[visit[2], visit[0]]}
        if not self.worth(peak - capacity + min(spill.room_R), [(lender, borrower) for _, lender, borrower in visits]):
            return at_home(count_RE, load_E, placement)
        quota_RE = np.zeros_like(count_RE)
        quota_RE[home_E, np.arange(len(home_E))] = load_E
        expert_N, lender_N, borrower_N, rows_N = np.array(moves).T
        np.subtract.at(quota_RE, (lender_N, expert_N), rows_N)
        np.add.at(quota_RE, (borrower_N, expert_N), rows_N)
        return Assignment(count_RE=count_RE, quota_RE=quota_RE)

    def _compiled(self, count_RE: NDArray[np.int64], placement: Placement) -> NDArray[np.int64] | None:
        """The same quotas, where least_loaded.cpp is built and knows the price of a visit."""
        if (library := DECIDERS.load()) is None or type(self.worth) is not BreakEven or not takes(count_RE):
            return None
        quota_RE, (ranks, num_experts) = np.zeros_like(count_RE), count_RE.shape
        refused = library.evenmoe_least_loaded(
            address(count_RE),
            ranks,
            num_experts,
            address(placement.home_E),
            address(placement.held_RE) if placement.slots > num_experts else None,
            address(_dense(self.node_R or (0,) * ranks)),
            min(self.min_chunk, 2**62),
            self.headroom,
            self.worth.rows,
            address(quota_RE),
        )
        return None if refused else quota_RE


@lru_cache(maxsize=1024)
def _dense(node_R: tuple[int, ...]) -> NDArray[np.int64]:
    """The nodes in their order, as 0, 1, ..."""
    return np.unique(node_R, return_inverse=True)[1].astype(np.int64)


class _Spill:
    """Rows leaving overloaded ranks, in plain lists: at 64 ranks and 256 experts numpy's call overhead would dominate.

    room_R: rows a rank can still take, negative where it has too many. rooms_of: for each node, (room, rank) of the
    ranks that can still take a chunk, ascending. total_of: their rooms together.
    """

    def __init__(self, room_R: list[int], node_R: Sequence[int], chunk: int) -> None:
        self.room_R, self.node_R, self.chunk = room_R, node_R, chunk
        self.rooms_of: dict[int, list[tuple[int, int]]] = {node: [] for node in sorted(set(node_R))}
        for room, rank in sorted(zip(room_R, range(len(room_R)))):
            if room >= chunk:
                self.rooms_of[node_R[rank]].append((room, rank))
        self.total_of = {node: sum(room for room, _ in rooms) for node, rooms in self.rooms_of.items()}

    def moves(self, load_E: NDArray[np.int64], placement: Placement) -> list[Move]:
        """Leaves no rank with a chunk more than its capacity.

        Every lender exports what it can within its node before anybody crosses to another.
        """
        moves: list[Move] = []
        loads = load_E.tolist()
        excess_R = {rank: -room for rank, room in enumerate(self.room_R) if -room >= self.chunk}
        lenders = sorted(excess_R, key=excess_R.__getitem__, reverse=True)
        left = {lender: [(-loads[expert], expert) for expert in placement.homed_R[lender]] for lender in lenders}
        if placement.slots > placement.num_experts:
            for lender in lenders:
                moves += self._to_copies(lender, left[lender], placement)
        for lender in lenders:
            heapify(left[lender])
        for receiver in (self._neighbour, self._anybody):
            for lender in lenders:
                if -self.room_R[lender] >= self.chunk:
                    moves += self._export(lender, left[lender], receiver)
        return moves

    def _export(self, lender: int, left: list[tuple[int, int]], receiver: Receiver) -> Iterator[Move]:
        """Until less than a chunk is too much. left: (-rows still here, expert), a heap.

        Each visit takes from the expert with most rows left, not from one expert until it is spent: a visit that fills
        its borrower has done all it can, one that spends its expert leaves room that needs another visit.
        """
        while (excess := -self.room_R[lender]) >= self.chunk:
            minus, expert = left[0]
            if (found := receiver(lender, min(-minus, excess))) is None:
                return
            borrower, rows = found
            yield expert, lender, borrower, rows
            self._take(borrower, rows)
            self.room_R[lender] += rows
            heapreplace(left, (minus + rows, expert))

    def _to_copies(self, lender: int, left: list[tuple[int, int]], placement: Placement) -> Iterator[Move]:
        """Rows that need no visit, because the rank that takes them holds a copy. left: (-rows still here, expert)."""
        for index, (_, expert) in enumerate(left):
            for rank in np.flatnonzero(placement.held_RE[:, expert]).tolist():
                rows = min(-self.room_R[lender], -left[index][0], self.room_R[rank])
                if rank != lender and rows > 0:
                    yield expert, lender, rank, rows
                    self._take(rank, rows)
                    self.room_R[lender] += rows
                    left[index] = left[index][0] + rows, expert

    def _neighbour(self, lender: int, rows: int) -> tuple[int, int] | None:
        """Who on the lender's node takes how many of these rows."""
        return self._best_fit((self.node_R[lender],), rows)

    def _anybody(self, lender: int, rows: int) -> tuple[int, int] | None:
        """Somebody on the node with most room, then on any."""
        home = self.node_R[lender]
        if away := [node for node in self.rooms_of if node != home]:
            roomiest = max(away, key=self.total_of.__getitem__)
            if (found := self._best_fit((roomiest,), rows) or self._best_fit(away, rows)) is not None:
                return found
        # Only crumbs are left. One of them takes a chunk too many: that is what min_chunk allows. Some rank has room,
        # for the capacities together hold all rows.
        near = [rank for rank, room in enumerate(self.room_R) if room > 0 and self.node_R[rank] == home]
        rank = max(near or range(len(self.room_R)), key=self.room_R.__getitem__)
        return rank, rows if rows <= self.room_R[rank] + self.chunk else self.chunk

    def _best_fit(self, nodes: Sequence[int], rows: int) -> tuple[int, int] | None:
        """The smallest room that takes all rows; else the largest, if what it takes is worth a visit."""
        fit: tuple[int, int] | None = None
        room, rank = 0, -1
        for node in nodes:
            rooms = self.rooms_of[node]
            if not rooms:
                continue
            if rooms[-1][0] >= rows:
                candidate = rooms[bisect_left(rooms, (rows, -1))]
                fit = candidate if fit is None or candidate < fit else fit
            elif rooms[-1] > (room, rank):
                room, rank = rooms[-1]
        if fit is not None:
            return fit[1], rows
        if room < self.chunk:
            return None
        return rank, rows if rows - room < self.chunk else room

    def _take(self, rank: int, rows: int) -> None:
        node, room = self.node_R[rank], self.room_R[rank]
        rooms = self.rooms_of[node]
        if room >= self.chunk:
            rooms.pop(bisect_left(rooms, (room, rank)))
            self.total_of[node] -= room
        self.room_R[rank] = room = room - rows
        if room >= self.chunk:
            insort(rooms, (room, rank))
            self.total_of[node] += room
