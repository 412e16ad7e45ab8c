"""Copies: the experts that live on several ranks, as flat tables, and the copies nearest to each row. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from placement import Placement
from routing.assignment import Assignment

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Experts m with several copies; all their copies c, by expert, node and rank; groups g of copies on one node.

    expert_M, copies_M, first_M, first_group_M: of such an expert, its id, its copies, the first copy, the first group.
    many_G, node_G, size_G, first_G: of a group, its expert, node, copies and first copy. rank_C, expert_C, many_C,
    group_C: of a copy. turn_C, far_turn_C: when it is the copy's turn to take one of the rows that do not divide by the
    group, or by all copies; each expert begins elsewhere, or the lowest ranks would take them all. sorted_R, first_V:
    the ranks by node, and where each node begins.
    """

    expert_M: IntArray
    copies_M: IntArray
    first_M: IntArray
    first_group_M: IntArray
    many_G: IntArray
    node_G: IntArray
    size_G: IntArray
    first_G: IntArray
    rank_C: IntArray
    expert_C: IntArray
    many_C: IntArray
    group_C: IntArray
    turn_C: IntArray
    far_turn_C: IntArray
    sorted_R: IntArray
    first_V: IntArray

    def nearest(self, count_RE: IntArray, load_E: IntArray) -> IntArray:
        """Rows of each copy if a row goes to its own rank's, else evenly to its node's, else evenly to all. -> [C]"""
        rows_C: IntArray = count_RE[self.rank_C, self.expert_C]
        load_M = load_E[self.expert_M]
        if len(self.first_V) == 1:
            rows_G = load_M
        else:
            count_RM = count_RE.take(self.expert_M, axis=1)[self.sorted_R]
            rows_G = np.add.reduceat(count_RM, self.first_V, axis=0)[self.node_G, self.many_G]
        each_G, odd_G = np.divmod(rows_G - np.add.reduceat(rows_C, self.first_G), self.size_G)
        rows_C += each_G[self.group_C] + (self.turn_C < odd_G[self.group_C])
        if len(self.first_V) > 1:
            each_M, odd_M = np.divmod(load_M - np.add.reduceat(rows_G, self.first_group_M), self.copies_M)
            rows_C += each_M[self.many_C] + (self.far_turn_C < odd_M[self.many_C])
        return rows_C

    def assigned(
        self, count_RE: IntArray, load_E: IntArray, placement: Placement, rows_C: IntArray | list[int]
    ) -> Assignment:
        """Every copy computes its rows, and an expert without another copy is computed at home."""
        quota_RE = np.zeros(count_RE.shape, dtype=np.int64)
        quota_RE[placement.home_E, np.arange(placement.num_experts)] = load_E
        quota_RE[self.rank_C, self.expert_C] = rows_C
        return Assignment(count_RE=count_RE, quota_RE=quota_RE)


@lru_cache(maxsize=1024)
def copies_of(placement: Placement, node_R: tuple[int, ...]) -> Copies:
    """Kept for each placement: it serves many steps, and the tables take longer than a decision.

    node_R: the node of each rank; empty for one node.
    """
    node_name_R = np.array(node_R or (0,) * placement.ranks)
    _, rank_node_R = np.unique(node_name_R, return_inverse=True)
    rank_C, expert_C = np.nonzero(placement.held_RE & (placement.copies_E > 1))
    order = np.lexsort((rank_C, rank_node_R[rank_C], expert_C))
    rank_C, expert_C = rank_C[order], expert_C[order]
    node_C, place_C = rank_node_R[rank_C], np.arange(len(rank_C))
    expert_M, many_C, copies_M = np.unique(expert_C, return_inverse=True, return_counts=True)
    first_M = copies_M.cumsum() - copies_M
    pair_C = expert_C * placement.ranks + node_C
    _, first_G, group_C, size_G = np.unique(pair_C, return_index=True, return_inverse=True, return_counts=True)
    sorted_R = np.argsort(rank_node_R, kind="stable")
    return Copies(
        expert_M=expert_M,
        copies_M=copies_M,
        first_M=first_M,
        first_group_M=group_C[first_M],
        many_G=many_C[first_G],
        node_G=node_C[first_G],
        size_G=size_G,
        first_G=first_G,
        rank_C=rank_C,
        expert_C=expert_C,
        many_C=many_C,
        group_C=group_C,
        turn_C=(place_C - first_G[group_C] - expert_C) % size_G[group_C],
        far_turn_C=(place_C - first_M[many_C] - expert_C) % copies_M[many_C],
        sorted_R=sorted_R,
        first_V=np.unique(rank_node_R[sorted_R], return_index=True)[1],
    )


def require_nodes(node_R: tuple[int, ...], ranks: int) -> None:
    if node_R and len(node_R) != ranks:
        raise ValueError(f"node_R names the nodes of {len(node_R)} ranks, but the group has {ranks}")
