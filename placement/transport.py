"""Giving items to ranks with room for a few each, at the largest total gain: exact, and many problems at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from placement.arrays import FloatArray, IntArray


def transport(gain_BNR: FloatArray, room_R: Sequence[int]) -> IntArray:
    """rank_BN that maximises sum_n gain[b, n, rank[b, n]] with at most room_R items on a rank, for each problem b.

    Items enter one by one along the cheapest chain of replacements: the new item takes a place, whoever sat there moves
    on, and so on to a rank with room. Chains are shortest paths over ranks alone, so the work grows with the number of
    items, not its square. Ties go to the lowest rank and the earliest seat.
    """
    problems, items, ranks = gain_BNR.shape
    room = np.asarray(room_R, dtype=np.int64)
    if len(room) != ranks or room.sum() < items:
        raise ValueError(f"{items} items do not fit ranks with room for {room.tolist()}")
    seats = int(room.max())
    # The last item is nobody: its replacement costs too much to happen.
    gain = np.concatenate([gain_BNR, np.zeros((problems, 1, ranks))], axis=1)
    item_BRS = np.full((problems, ranks, seats), items, dtype=np.int64)
    taken_BR = np.zeros((problems, ranks), dtype=np.int64)
    step_BRR = np.full((problems, ranks, ranks), np.inf)
    seat_BRR = np.zeros((problems, ranks, ranks), dtype=np.int64)
    b = np.arange(problems)
    rounding = float(np.abs(gain_BNR).max(initial=0.0)) * 1e-12
    for item in range(items):
        cost_BR, before_BR = _cheapest_chains(-gain[:, item], step_BRR, rounding)
        end_B = np.where(taken_BR < room, cost_BR, np.inf).argmin(axis=1)
        b_N, rank_N = _walk_back(item_BRS, taken_BR, seat_BRR, before_BR, end_B=end_B, item=item)
        # Only ranks on a chain have other people on their seats than before.
        step_BRR[b_N, rank_N], seat_BRR[b_N, rank_N] = _replacements(gain, item_BRS[b_N, rank_N], b_N, rank_N, items)
    rank_BN = np.zeros((problems, items + 1), dtype=np.int64)
    for rank in range(ranks):
        rank_BN[b[:, None], item_BRS[:, rank]] = rank
    return rank_BN[:, :items]


def _replacements(
    gain: FloatArray, item_NS: IntArray, b_N: IntArray, rank_N: IntArray, nobody: int
) -> tuple[FloatArray, IntArray]:
    """(step[n, h], seat[n, h]): what the cheapest move of someone from rank n to h costs, and who moves."""
    gain_NSR = gain[b_N[:, None], item_NS]
    cost_NSR = gain_NSR[np.arange(len(b_N)), :, rank_N][:, :, None] - gain_NSR
    cost_NSR[item_NS == nobody] = np.inf
    seat_NR = cost_NSR.argmin(axis=1)
    step_NR: FloatArray = cost_NSR.min(axis=1)
    return step_NR, seat_NR


def _cheapest_chains(direct_BR: FloatArray, step_BRR: FloatArray, rounding: float) -> tuple[FloatArray, IntArray]:
    """Cost of reaching each rank, and the rank before it on the way; -1 where the item goes there directly.

    Bellman-Ford. The seats so far are optimal for the items so far, so no cycle is profitable but by rounding, and a
    chain is lengthened only by a true gain.
    """
    ranks = direct_BR.shape[1]
    cost_BR, before_BR = direct_BR.copy(), np.full(direct_BR.shape, -1, dtype=np.int64)
    for _ in range(ranks - 1):
        via_BRR = cost_BR[:, :, None] + step_BRR
        best_BR = via_BRR.argmin(axis=1)
        through_BR = np.take_along_axis(via_BRR, best_BR[:, None], axis=1)[:, 0]
        better = through_BR < cost_BR - rounding
        if not better.any():
            break
        cost_BR = np.where(better, through_BR, cost_BR)
        before_BR = np.where(better, best_BR, before_BR)
    return cost_BR, before_BR


def _walk_back(
    item_BRS: IntArray, taken_BR: IntArray, seat_BRR: IntArray, before_BR: IntArray, *, end_B: IntArray, item: int
) -> tuple[IntArray, IntArray]:
    """Move everyone on the chain one rank on, from its end, and seat the item at its start; (problem, rank) touched."""
    b = np.arange(len(end_B))
    rank_B, seat_B = end_B, taken_BR[b, end_B]
    taken_BR[b, end_B] += 1
    active = b
    touched = []
    for _ in range(before_BR.shape[1]):
        touched.append((active, rank_B))
        giver = before_BR[active, rank_B]
        starts = giver < 0
        item_BRS[active[starts], rank_B[starts], seat_B[starts]] = item
        active, rank_B, seat_B, giver = active[~starts], rank_B[~starts], seat_B[~starts], giver[~starts]
        if not active.size:
            problem_N, rank_N = (np.concatenate(part) for part in zip(*touched, strict=True))
            return problem_N, rank_N
        moved_seat = seat_BRR[active, giver, rank_B]
        item_BRS[active, rank_B, seat_B] = item_BRS[active, giver, moved_seat]
        rank_B, seat_B = giver, moved_seat
    raise AssertionError("a chain of replacements is a path, and a path has no more ranks than there are")
