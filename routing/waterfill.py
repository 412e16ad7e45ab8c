"""Waterfill: the lowest peak that the copies there are allow.

Rows of an expert can be split over its copies at will, so whole rows are a flow from experts to ranks. The least peak
is the linear programme's, rounded up: of all sets of ranks, the largest mean of the rows that only they can compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from placement import Placement
from routing.assigner import at_home
from routing.assignment import Assignment
from routing.copies import Copies, copies_of, require_nodes
from routing.native import DECIDERS, address

Lists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Waterfill:
    """No split of the rows over the copies has a lower peak. No expert visits: made for inference with copies.

    It starts from NearestCopy and moves rows only off ranks that are above that peak: to other copies of their experts,
    or by the shortest chain of them, where a rank takes rows of one expert and gives rows of another. So rows stay near
    where nearness costs nothing. node_R: the node of each rank, to prefer the copies there; empty means one node.
    """

    node_R: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_R", tuple(int(node) for node in self.node_R))

    def __call__(self, count_RE: NDArray[np.int64], placement: Placement) -> Assignment:
        ranks = len(count_RE)
        require_nodes(self.node_R, ranks)
        load_E = count_RE.sum(axis=0)
        if count_RE.shape != placement.held_RE.shape or placement.slots == placement.num_experts:
            return at_home(count_RE, load_E, placement)
        copies, links = copies_of(placement, self.node_R), _links_of(placement, self.node_R)
        nearest_C = copies.nearest(count_RE, load_E)
        alone_E = load_E.copy()
        alone_E[copies.expert_M] = 0
        alone_R = np.bincount(placement.home_E, alone_E, minlength=ranks).astype(np.int64)
        load_R = alone_R + np.bincount(copies.rank_C, nearest_C, minlength=ranks).astype(np.int64)
        bound = max(-(-int(load_R.sum()) // ranks), _bound(copies, alone_R, load_E))
        rows_C, peak = _lowered(links, nearest_C, load_R, bound)
        if peak > bound:
            # Rows have moved for the sake of a peak that cannot be had; fewer need to move for the one that can.
            rows_C, _ = _lowered(links, nearest_C, load_R, peak)
        return copies.assigned(count_RE, load_E, placement, rows_C)


def _bound(copies: Copies, alone_R: NDArray[np.int64], load_E: NDArray[np.int64]) -> int:
    """No peak is below the rows of experts that live on one rank alone, nor below the mean of one expert's ranks."""
    around_M = np.add.reduceat(alone_R[copies.rank_C], copies.first_M) + load_E[copies.expert_M]
    return max(int(alone_R.max()), -int((-around_M // copies.copies_M).min()))


@dataclass(frozen=True, kw_only=True)
class _Links:
    """Plain lists, for at these sizes numpy's call overhead would dominate.

    copies_R: the copies on each rank. rank_C: the rank of each copy. near_C, far_C, other_C: the other copies of its
    expert on its node, elsewhere, and both. flat: all of it as the compiled path reads it, tables and where they begin.
    """

    copies_R: Lists
    rank_C: tuple[int, ...]
    near_C: Lists
    far_C: Lists
    other_C: Lists
    flat: NDArray[np.int64]


@lru_cache(maxsize=1024)
def _links_of(placement: Placement, node_R: tuple[int, ...]) -> _Links:
    copies = copies_of(placement, node_R)
    near_CC = (copies.group_C[:, None] == copies.group_C) & ~np.eye(len(copies.group_C), dtype=np.bool_)
    far_CC = (copies.many_C[:, None] == copies.many_C) & (copies.group_C[:, None] != copies.group_C)
    near_C, far_C = _listed(near_CC), _listed(far_CC)
    other_C = tuple(near + far for near, far in zip(near_C, far_C))
    copies_R = _listed(np.arange(placement.ranks)[:, None] == copies.rank_C)
    start_R, start_C = (np.cumsum([0, *map(len, lists)]) for lists in (copies_R, other_C))
    first_far_C = start_C[:-1] + list(map(len, near_C))
    tables = (start_R, np.concatenate(copies_R), copies.rank_C, start_C, first_far_C, np.concatenate(other_C))
    return _Links(
        copies_R=copies_R,
        rank_C=tuple(copies.rank_C.tolist()),
        near_C=near_C,
        far_C=far_C,
        other_C=other_C,
        flat=np.concatenate(tables).astype(np.int64),
    )


def _listed(table: NDArray[np.bool_]) -> Lists:
    """The columns that hold, of each row."""
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in table)


def _lowered(
    links: _Links, rows_C: NDArray[np.int64], load_R: NDArray[np.int64], peak: int
) -> tuple[list[int] | NDArray[np.int64], int]:
    """Rows of each copy with no rank above the peak, or above the least that there is. -> rows, that peak"""
    room_R = peak - load_R
    if (library := DECIDERS.load()) is None:
        level = _Level(links, rows_C.tolist(), room_R.tolist(), peak)
        return level.rows_C, level.lower()
    rows_C = rows_C.copy()
    places = address(links.flat), len(room_R), len(rows_C), address(rows_C), address(room_R)
    return rows_C, int(library.evenmoe_level(*places, peak))


class _Level:
    """Rows that move between copies until no rank is above the peak.

    rows_C: rows of each copy. room_R: rows that a rank can still take, negative where it has too many.
    """

    def __init__(self, links: _Links, rows_C: list[int], room_R: list[int], peak: int) -> None:
        self.links, self.rows_C, self.room_R, self.peak = links, rows_C, room_R, peak

    def lower(self) -> int:
        """-> the peak, raised to the least there is if the one aimed at cannot be had.

        Every rank gives what it can to copies on its node before anybody crosses to another, and what it can directly
        before anybody forms a chain. These two are only for speed and nearness; the chains alone would do.
        """
        over = [rank for rank, room in enumerate(self.room_R) if room < 0]
        for other_C in (self.links.near_C, self.links.far_C):
            over = [rank for rank in over if not self._give(rank, other_C)]
        for rank in over:
            while self.room_R[rank] < 0:
                self._pass_on(rank)
        return self.peak

    def _give(self, rank: int, other_C: Lists) -> bool:
        """Rows go straight to another copy whose rank has room. -> whether the rank is within the peak now"""
        rows_C, room_R, rank_C = self.rows_C, self.room_R, self.links.rank_C
        excess = -room_R[rank]
        for copy in self.links.copies_R[rank]:
            for other in other_C[copy]:
                if (room := room_R[rank_C[other]]) > 0 and (rows := min(excess, rows_C[copy], room)):
                    rows_C[copy] -= rows
                    rows_C[other] += rows
                    room_R[rank_C[other]] = room - rows
                    excess -= rows
                    if not excess:
                        room_R[rank] = 0
                        return True
        room_R[rank] = -excess
        return False

    def _pass_on(self, rank: int) -> None:
        """Rows go along the shortest chains of copies that end where there is room; without any, the peak rises.

        For then the ranks that were reached hold every copy of all that they compute, and are full: no split brings
        their peak below their mean. The search goes on beyond a rank that it has filled, until a chain is used up.
        """
        rows_C, room_R, rank_C = self.rows_C, self.room_R, self.links.rank_C
        came: dict[int, tuple[int, int]] = {rank: (-1, -1)}  # rank -> the copy that gives to one there, and that one
        queue = [rank]
        for giver in queue:
            for copy in self.links.copies_R[giver]:
                if rows_C[copy]:
                    for other in self.links.other_C[copy]:
                        taker = rank_C[other]
                        if taker not in came:
                            came[taker] = copy, other
                            if room_R[taker] > 0 and not self._filled(taker, rank, came):
                                return
                            queue.append(taker)
        rise = -(sum(room_R[reached] for reached in came) // len(came))
        self.peak += rise
        for reached in range(len(room_R)):
            room_R[reached] += rise

    def _filled(self, taker: int, rank: int, came: dict[int, tuple[int, int]]) -> bool:
        """Rows go from the rank to the taker. -> whether it was the taker's room that set their number, and no more"""
        chain, last = [], taker
        while last != rank:
            chain.append(came[last])
            last = self.links.rank_C[came[last][0]]
        room = self.room_R[taker]
        most = min(-self.room_R[rank], *[self.rows_C[copy] for copy, _ in chain])
        rows = min(room, most)
        for copy, other in chain:
            self.rows_C[copy] -= rows
            self.rows_C[other] += rows
        self.room_R[rank] += rows
        self.room_R[taker] -= rows
        return room < most
