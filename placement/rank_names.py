"""Which rank takes which group of experts: the slowest pair of ranks between layers, as fast as can be."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.topology import Topology

# Up to this many ways to name a layer's groups, dynamic programming over all of them gives the optimum.
LISTED = 720


def slowness_RR(topology: Topology) -> FloatArray:
    """Time of a unit of mass between two ranks, the faster link's being 1; 0 on a rank itself."""
    node_R = np.array(topology.node_R)
    within, across = 1 / topology.within_node.bandwidth, 1 / topology.across_nodes.bandwidth
    slow_RR = np.where(node_R[:, None] == node_R, within, across) / min(within, across)
    np.fill_diagonal(slow_RR, 0.0)
    return slow_RR


def flow_LGG(group_LE: IntArray, pair_LEE: FloatArray, groups: int) -> FloatArray:
    """Mass from each group of a layer to each group of the next."""
    one_LEG = (group_LE[:, :, None] == np.arange(groups)).astype(np.float64)
    flow: FloatArray = one_LEG[:-1].transpose(0, 2, 1) @ pair_LEE @ one_LEG[1:]
    return flow


def slowest(flow: FloatArray, rank_LG: IntArray, slow_RR: FloatArray) -> float:
    """MoETuner's second objective: the time of the slowest pair of ranks, summed over layers."""
    total = 0.0
    for layer, flow_GG in enumerate(flow):
        total += float((flow_GG * slow_RR[rank_LG[layer][:, None], rank_LG[layer + 1]]).max())
    return total


def named(flow: FloatArray, topology: Topology, seconds: float, seed: int) -> tuple[IntArray, str]:
    """(rank_LG, how far it is proved): ranks trade groups only with ranks of the same slots and speed."""
    slow_RR = slowness_RR(topology)
    kinds = list(zip(topology.slots_R, topology.speed_R, strict=True))
    ways = math.prod(math.factorial(kinds.count(kind)) for kind in set(kinds))
    if ways <= LISTED:
        every = [way for way in permutations(range(topology.ranks)) if [kinds[r] for r in way] == kinds]
        return _listed(flow, np.array(every), slow_RR), "optimal"
    alike_RR = np.array([[one == other for other in kinds] for one in kinds], dtype=np.int64)
    return _by_blocks(flow, slow_RR, alike_RR, seconds, seed=seed), "searched by blocks"


def _listed(flow: FloatArray, way_WG: IntArray, slow_RR: FloatArray) -> IntArray:
    """Dynamic programming over every naming of every layer."""
    cost_W = np.zeros(len(way_WG))
    came = []
    for flow_GG in flow:
        # One naming of the layer at a time, against every naming of the next.
        step_WW = np.stack([(flow_GG * slow_RR[way_G[:, None], way_WG[:, None]]).max(axis=(1, 2)) for way_G in way_WG])
        total_WW = cost_W[:, None] + step_WW
        came.append(total_WW.argmin(axis=0))
        cost_W = total_WW.min(axis=0)
    chosen = [int(cost_W.argmin())]
    for came_W in reversed(came):
        chosen.append(int(came_W[chosen[-1]]))
    return way_WG[chosen[::-1]]


def _by_blocks(
    flow: FloatArray, slow_RR: FloatArray, alike_RR: IntArray, seconds: float, *, seed: int, sweeps: int = 2
) -> IntArray:
    from placement import programmes

    layers, ranks = len(flow) + 1, len(slow_RR)
    rank_LG = np.repeat(np.arange(ranks)[None], layers, axis=0)
    nothing = np.zeros((ranks, ranks))
    for _ in range(sweeps):
        before = rank_LG.copy()
        for layer in range(layers):
            before_RG, after_GR = nothing.copy(), nothing.copy()
            if layer:
                before_RG[rank_LG[layer - 1]] = flow[layer - 1]
            if layer < layers - 1:
                after_GR[:, rank_LG[layer + 1]] = flow[layer]
            limit = seconds / (sweeps * layers)
            solved, rank_G = programmes.names(before_RG, after_GR, slow_RR, alike_RR, limit, seed=seed)
            tried = rank_LG.copy()
            tried[layer] = rank_G
            if solved.found and slowest(flow, tried, slow_RR) < slowest(flow, rank_LG, slow_RR):
                rank_LG = tried
        if (before == rank_LG).all():
            break
    return rank_LG
