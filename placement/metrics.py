"""Imbalance, hops, fan-out and moves: the one definition of each, used everywhere.

Copies of an expert share its load evenly, whichever rank a row comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.arrays import BoolArray, FloatArray, IntArray
from placement.plan import Placement, Plan
from placement.topology import Topology


def shares_LRE(plan: Plan) -> FloatArray:
    """The share of each expert's load that falls on each rank."""
    return np.stack([placement.held_RE / placement.copies_E for placement in plan.placement_L])


def rank_load_WLR(plan: Plan, load_WLE: FloatArray) -> FloatArray:
    require_same_shape(plan, load_WLE.shape[1], load_WLE.shape[2])
    # [L,W,E] x [L,E,R]: a matrix product per layer, in a fixed order.
    rank_load: FloatArray = (load_WLE.transpose(1, 0, 2) @ shares_LRE(plan).transpose(0, 2, 1)).transpose(1, 0, 2)
    return rank_load


def require_same_shape(plan: Plan, layers: int, num_experts: int) -> None:
    planned = (len(plan.placement_L), plan.placement_L[0].num_experts)
    if planned != (layers, num_experts):
        raise ValueError(
            f"the plan places {planned[0]} layers x {planned[1]} experts, the trace has {layers} x {num_experts}; "
            f"use a plan and a trace of one model"
        )


def peak_over_mean(rank_load: FloatArray, speed_R: Sequence[float]) -> FloatArray:
    """How much longer the slowest rank takes than it would with the load spread by speed; 1 where there is no load.

    rank_load [..., R] -> [...].
    """
    speed = np.asarray(speed_R, dtype=np.float64)
    mean = rank_load.sum(axis=-1) / speed.sum()
    peak = (rank_load / speed).max(axis=-1)
    ratio: FloatArray = np.where(mean > 0, peak / np.where(mean > 0, mean, 1.0), 1.0)
    return ratio


def peak_over_mean_L(plan: Plan, load_LE: FloatArray, topology: Topology) -> FloatArray:
    return peak_over_mean(rank_load_WLR(plan, load_LE[None])[0], topology.speed_R)


def local_L(plan: Plan, pair_LEE: FloatArray, group_R: Sequence[int]) -> FloatArray:
    """Share of the mass from each layer to the next that stays within a group of ranks. A rank alone: range(ranks)."""
    group = np.asarray(group_R)
    share_LRE = shares_LRE(plan)
    share_LGE = np.stack([share_LRE[:, group == g].sum(axis=1) for g in range(int(group.max()) + 1)])
    share_LGE = share_LGE.transpose(1, 0, 2)
    return np.array(
        [
            ((share_LGE[layer] @ pair_EE) * share_LGE[layer + 1]).sum() / max(pair_EE.sum(), np.finfo(float).tiny)
            for layer, pair_EE in enumerate(pair_LEE)
        ]
    )


def local_share(plan: Plan, pair_LEE: FloatArray, group_R: Sequence[int]) -> float:
    """Share of all hops that stay within a group of ranks."""
    mass_L = pair_LEE.sum(axis=(1, 2))
    return float((local_L(plan, pair_LEE, group_R) * mass_L).sum() / max(mass_L.sum(), np.finfo(float).tiny))


def fan_out(plan: Plan, expert_TLK: NDArray[np.int32], group_R: Sequence[int]) -> float:
    """Distinct groups of ranks that a token's experts sit on, averaged over layers and tokens.

    Token t takes copy number t mod copies of each expert, which shares the load evenly.
    """
    group = np.asarray(group_R)
    groups, total, rows = int(group.max()) + 1, 0, 0
    for layer, placement in enumerate(plan.placement_L):
        token_N, rank_N = token_rank(placement, expert_TLK[:, layer])
        reached: BoolArray = np.zeros((len(expert_TLK), groups), dtype=np.bool_)
        reached[token_N, group[rank_N]] = True
        total += int(reached.sum())
        rows += int(reached.any(axis=1).sum())
    return total / max(rows, 1)


def token_rank(placement: Placement, expert_TK: NDArray[np.int32]) -> tuple[IntArray, IntArray]:
    """(token_N, rank_N): the rank that serves each choice made. Token t takes copy number t mod copies."""
    token_N, choice_N = np.nonzero(expert_TK >= 0)
    expert_N = expert_TK[token_N, choice_N]
    order_ER = np.argsort(~placement.held_RE.T, axis=1, kind="stable")
    return token_N, order_ER[expert_N, token_N % placement.copies_E[expert_N]]


def moves_L(before: Plan, after: Plan) -> NDArray[np.int64]:
    """Experts that each layer's ranks must fetch to go from one plan to the other."""
    if len(before.placement_L) != len(after.placement_L) or before.ranks != after.ranks:
        raise ValueError(
            f"cannot compare {len(before.placement_L)} layers on {before.ranks} ranks "
            f"with {len(after.placement_L)} layers on {after.ranks} ranks"
        )
    pairs = zip(before.placement_L, after.placement_L, strict=True)
    if any(old.num_experts != new.num_experts for old, new in pairs):
        raise ValueError("the plans place different numbers of experts; compare plans of one model")
    pairs = zip(before.placement_L, after.placement_L, strict=True)
    return np.array([int((new.held_RE & ~old.held_RE).sum()) for old, new in pairs])
