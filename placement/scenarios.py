"""Scenarios: the few loads that a plan must be good for, named in the trace or found among its windows."""

from __future__ import annotations

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.trace import LoadTrace


def scenarios(trace: LoadTrace, most: int, seed: int) -> FloatArray:
    """load_KLE: windows of one name added up; nameless windows as they are. More than `most` are clustered down.

    Every layer of every scenario is scaled to a total of 1, so that a long scenario does not outweigh a short one.
    """
    if trace.name_W:
        names = sorted(set(trace.name_W))
        load_KLE = np.stack([_sum(trace, [own == name for own in trace.name_W]) for name in names])
    else:
        load_KLE = np.array(trace.load_WLE)
    load_KLE = load_KLE[load_KLE.sum(axis=(1, 2)) > 0]
    if len(load_KLE) > most:
        cluster_K = _clusters(_scaled(load_KLE), most, seed)
        load_KLE = np.stack([load_KLE[cluster_K == cluster].sum(axis=0) for cluster in np.unique(cluster_K)])
    return _scaled(load_KLE)


def _sum(trace: LoadTrace, chosen_W: list[bool]) -> FloatArray:
    total: FloatArray = trace.load_WLE[np.array(chosen_W)].sum(axis=0)
    return total


def _scaled(load_KLE: FloatArray) -> FloatArray:
    """A layer without load in some scenario says nothing about it: it takes the mean of the scenarios that know."""
    total_KL = load_KLE.sum(axis=2, keepdims=True)
    share_KLE: FloatArray = load_KLE / np.where(total_KL > 0, total_KL, 1.0)
    mean_LE = share_KLE.sum(axis=0) / np.maximum((total_KL > 0).sum(axis=0), 1)
    return np.where(total_KL > 0, share_KLE, mean_LE)


def _clusters(point_KLE: FloatArray, clusters: int, seed: int, rounds: int = 50) -> IntArray:
    """k-means, started from points that are far from each other: the first is the one nearest the mean of all."""
    point_KN = point_KLE.reshape(len(point_KLE), -1)
    random = np.random.default_rng(seed)
    chosen = [int(_distance(point_KN, point_KN.mean(axis=0, keepdims=True))[:, 0].argmin())]
    while len(chosen) < clusters:
        chosen.append(int(_distance(point_KN, point_KN[chosen]).min(axis=1).argmax()))
    centre_CN = point_KN[chosen]
    cluster_K = np.full(len(point_KN), -1, dtype=np.int64)
    for _ in range(rounds):
        nearest = _distance(point_KN, centre_CN).argmin(axis=1)
        if (nearest == cluster_K).all():
            break
        cluster_K = nearest
        for cluster in range(clusters):
            members = point_KN[cluster_K == cluster]
            centre_CN[cluster] = members.mean(axis=0) if len(members) else point_KN[random.integers(len(point_KN))]
    return cluster_K


def _distance(point_KN: FloatArray, centre_CN: FloatArray) -> FloatArray:
    square: FloatArray = (point_KN**2).sum(axis=1)[:, None] - 2 * point_KN @ centre_CN.T + (centre_CN**2).sum(axis=1)
    return square
