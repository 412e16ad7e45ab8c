"""What share of hops could stay on a rank at most: an upper bound for any placement whose copies share evenly."""

from __future__ import annotations

import numpy as np

from placement.arrays import FloatArray
from placement.topology import Topology

METHOD = "closed form; hops by b-matching duality"
ROUNDS = 60


def local_bound_L(pair_LEE: FloatArray, topology: Topology) -> FloatArray:
    """For each layer but the last: no placement keeps a larger share of its mass on a rank.

    Copies that share evenly are an average over choices of one copy each, so it is enough to bound single copies.

    An expert shares its rank with at most `room` experts of the next layer, so the kept mass is at most a b-matching's,
    and a b-matching is at most  room (sum u + sum v) + sum max(0, T - u - v)  for any u, v >= 0. The u, v found here
    need not be the best ones; the bound holds for any. Where ranks are alike and full, the spectrum bounds it as well.
    """
    experts, slots = pair_LEE.shape[1], topology.slots_R
    mass_L = pair_LEE.sum(axis=(1, 2))
    share_LEE = pair_LEE / np.where(mass_L > 0, mass_L, 1.0)[:, None, None]
    bound_L = np.minimum(_dual_L(share_LEE, max(slots)), 1.0)
    if len(set(slots)) == 1 and topology.slots == experts:
        bound_L = np.minimum(bound_L, _spectral_L(share_LEE, topology.ranks))
    return np.where(mass_L > 0, bound_L, 1.0)


def _dual_L(share_LEE: FloatArray, room: int) -> FloatArray:
    """Row and column prices by damped balancing of a smoothed b-matching, ever less smooth; the best bound met."""
    experts = share_LEE.shape[1]
    if room >= experts:
        everything_L: FloatArray = share_LEE.sum(axis=(1, 2))
        return everything_L
    scale_L = np.maximum(share_LEE.max(axis=(1, 2)), np.finfo(float).tiny)[:, None]
    # The room-th largest entry of a row, halved, is where a fair split of the price would start.
    u_LE = -np.partition(-share_LEE, room - 1, axis=2)[:, :, room - 1] / 2
    v_LE = -np.partition(-share_LEE, room - 1, axis=1)[:, room - 1] / 2
    best_L: FloatArray = _dual_value(share_LEE, u_LE, v_LE, room)
    for heat in np.geomspace(0.1, 1e-4, ROUNDS):
        u_LE = np.maximum(u_LE + _correction(share_LEE, u_LE, v_LE, scale_L * heat, room), 0.0)
        turned = share_LEE.transpose(0, 2, 1)
        v_LE = np.maximum(v_LE + _correction(turned, v_LE, u_LE, scale_L * heat, room), 0.0)
        best_L = np.minimum(best_L, _dual_value(share_LEE, u_LE, v_LE, room))
    return best_L


def _dual_value(share_LEE: FloatArray, u_LE: FloatArray, v_LE: FloatArray, room: int) -> FloatArray:
    over = np.maximum(share_LEE - u_LE[:, :, None] - v_LE[:, None], 0.0)
    value_L: FloatArray = room * (u_LE.sum(axis=1) + v_LE.sum(axis=1)) + over.sum(axis=(1, 2))
    return value_L


def _correction(share_LEE: FloatArray, u_LE: FloatArray, v_LE: FloatArray, heat: FloatArray, room: int) -> FloatArray:
    """How far to raise each row's price so that about `room` of its entries stay above it."""
    above = np.clip((share_LEE - u_LE[:, :, None] - v_LE[:, None]) / heat[:, :, None], -40.0, 40.0)
    taken_LE = (1.0 / (1.0 + np.exp(-above))).sum(axis=2)
    raise_LE: FloatArray = heat * np.log(np.maximum(taken_LE, 1e-12) / room)
    return raise_LE


def _spectral_L(share_LEE: FloatArray, ranks: int) -> FloatArray:
    """Equal groups meet the even part of the mass once, and the rest at most as far as its largest singular values."""
    experts = share_LEE.shape[1]
    centred = share_LEE - share_LEE.mean(axis=1, keepdims=True) - share_LEE.mean(axis=2, keepdims=True)
    centred += share_LEE.mean(axis=(1, 2), keepdims=True)
    singular_LE = np.linalg.svd(centred, compute_uv=False)
    bound_L: FloatArray = 1.0 / ranks + experts // ranks * singular_LE[:, : ranks - 1].sum(axis=1)
    return bound_L
