"""The integer programmes, each built from arrays, solved, and read back as arrays.

balance    MoETuner's first: a layer's experts to ranks, the busiest rank least busy (minimax: an objective of absolute
           deviations has a bound of 0 and proves nothing); with spare slots, how many copies each expert gets as well.
block      ExFlow's, one layer at a time: the most gain while the neighbours stay, under a cap on every rank's load.
whole      ExFlow's over all layers at once. Its relaxation is weak: expect a feasible answer and a wide gap.
names      MoETuner's second, one layer at a time: which rank takes which group, the slowest pair of ranks least slow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pulp

from placement.arrays import FloatArray, IntArray
from placement.solver import Solved, minimise
from placement.topology import Topology


def balance(load_E: FloatArray, topology: Topology, seconds: float, seed: int) -> tuple[Solved, IntArray]:
    """(what was proved, held_RE): minimise the time of the busiest rank. held_RE is all 0 where nothing was found."""
    experts, ranks = len(load_E), topology.ranks
    problem = pulp.LpProblem("balance", pulp.LpMinimize)
    x = _binaries(problem, "x", experts, ranks)
    peak = problem.add_variable("peak", lowBound=float(load_E.sum() / sum(topology.speed_R)))
    problem += peak
    most = min(topology.slots - experts + 1, sum(slots > 0 for slots in topology.slots_R))
    load: list[list[Any]] = []
    for e in range(experts):
        if most == 1:
            problem += pulp.lpSum(x[e]) == 1
            load.append([float(load_E[e]) * x[e][r] for r in range(ranks)])
        else:
            load.append(_shared(problem, e, x[e], float(load_E[e]), most))
    for r, (slots, speed) in enumerate(zip(topology.slots_R, topology.speed_R, strict=True)):
        problem += pulp.lpSum(x[e][r] for e in range(experts)) <= slots
        problem += pulp.lpSum(load[e][r] for e in range(experts)) <= speed * peak
    solved = minimise(problem, seconds, seed)
    return solved, _values(x, solved).T


def _shared(problem: pulp.LpProblem, e: int, x_R: list[Any], load: float, most: int) -> list[Any]:
    """Load variables of one expert: with c copies, a rank that holds one carries load / c."""
    copies = [problem.add_variable(f"c_{e}_{c}", cat="Binary") for c in range(1, most + 1)]
    problem += pulp.lpSum(copies) == 1
    problem += pulp.lpSum(x_R) == pulp.lpSum((c + 1) * copy for c, copy in enumerate(copies))
    share = []
    for r, held in enumerate(x_R):
        part = problem.add_variable(f"l_{e}_{r}", lowBound=0.0)
        problem += part <= load * held
        for c, copy in enumerate(copies):
            problem += part >= load / (c + 1) * (held + copy - 1)
        share.append(part)
    problem += pulp.lpSum(share) == load
    return share


def block(
    gain_ER: FloatArray, load_KE: FloatArray, topology: Topology, cap: float, seconds: float, *, seed: int
) -> tuple[Solved, IntArray]:
    """(what was proved, rank_E): the most gain with single copies; load_KE scaled to a mean time of 1."""
    experts, ranks = gain_ER.shape
    problem = pulp.LpProblem("block", pulp.LpMinimize)
    x = _binaries(problem, "x", experts, ranks)
    problem += pulp.lpSum(-float(gain_ER[e, r]) * x[e][r] for e in range(experts) for r in range(ranks))
    _seat(problem, x, topology)
    _cap(problem, x, load_KE, topology, cap)
    solved = minimise(problem, seconds, seed)
    return solved, _values(x, solved).argmax(axis=1)


def whole(
    pair_LEE: FloatArray, load_LKE: FloatArray, topology: Topology, cap: float, seconds: float, *, seed: int
) -> tuple[Solved, IntArray]:
    """(what was proved, rank_LE): the least mass that changes rank from layer to layer, all layers in one programme.

    The mass of a pair of experts is counted once, however many tokens made it.
    """
    layers, experts, ranks = len(load_LKE), load_LKE.shape[2], topology.ranks
    problem = pulp.LpProblem("whole", pulp.LpMinimize)
    x_L = [_binaries(problem, f"x{layer}", experts, ranks) for layer in range(layers)]
    crossing = []
    for layer, e, f in np.argwhere(pair_LEE > 0).tolist():
        apart = problem.add_variable(f"z_{layer}_{e}_{f}", 0, 1)
        for r in range(ranks):
            problem += apart >= x_L[layer][e][r] - x_L[layer + 1][f][r]
        crossing.append(float(pair_LEE[layer, e, f]) * apart)
    problem += pulp.lpSum(crossing)
    for x, load_KE in zip(x_L, load_LKE, strict=True):
        _seat(problem, x, topology)
        _cap(problem, x, load_KE, topology, cap)
    if len({*zip(topology.slots_R, topology.speed_R, strict=True)}) == 1:
        problem += x_L[0][0][0] == 1  # alike ranks have no names of their own: give one to the first expert
    solved = minimise(problem, seconds, seed)
    return solved, np.stack([_values(x, solved).argmax(axis=1) for x in x_L])


def names(
    before_RG: FloatArray,
    after_GR: FloatArray,
    slow_RR: FloatArray,
    alike_RR: IntArray,
    seconds: float,
    *,
    seed: int,
) -> tuple[Solved, IntArray]:
    """(what was proved, rank_G): each group of one layer to a rank, its neighbours' ranks given.

    before_RG, after_GR: mass from the ranks before to the groups, and from the groups to the ranks after. slow_RR: time
    of a unit of mass between two ranks. alike_RR[g, r]: whether the group may take the rank. Minimises the slowest pair
    before plus the slowest pair after.
    """
    ranks = len(slow_RR)
    problem = pulp.LpProblem("names", pulp.LpMinimize)
    y = _binaries(problem, "y", ranks, ranks)
    slowest_before, slowest_after = (problem.add_variable(name, lowBound=0.0) for name in ("before", "after"))
    problem += slowest_before + slowest_after
    for g in range(ranks):
        problem += pulp.lpSum(y[g]) == 1
        problem += pulp.lpSum(y[group][g] for group in range(ranks)) == 1
        for r in np.flatnonzero(alike_RR[g] == 0).tolist():
            problem += y[g][r] == 0
    for one, other in np.argwhere(~np.eye(ranks, dtype=np.bool_)).tolist():
        into, out = slow_RR[one, other] * before_RG[one], slow_RR[one, other] * after_GR[:, other]
        problem += slowest_before >= pulp.lpSum(float(into[g]) * y[g][other] for g in range(ranks))
        problem += slowest_after >= pulp.lpSum(float(out[g]) * y[g][one] for g in range(ranks))
    solved = minimise(problem, seconds, seed)
    return solved, _values(y, solved).argmax(axis=1)


def _binaries(problem: pulp.LpProblem, name: str, rows: int, columns: int) -> list[list[Any]]:
    return [[problem.add_variable(f"{name}_{i}_{j}", cat="Binary") for j in range(columns)] for i in range(rows)]


def _seat(problem: pulp.LpProblem, x: list[list[Any]], topology: Topology) -> None:
    for x_R in x:
        problem += pulp.lpSum(x_R) == 1
    for r, slots in enumerate(topology.slots_R):
        problem += pulp.lpSum(x_R[r] for x_R in x) <= slots


def _cap(problem: pulp.LpProblem, x: list[list[Any]], load_KE: FloatArray, topology: Topology, cap: float) -> None:
    if cap == float("inf"):
        return
    for load_E in load_KE:
        for r, speed in enumerate(topology.speed_R):
            problem += pulp.lpSum(float(load_E[e]) * x_R[r] for e, x_R in enumerate(x)) <= cap * speed


def _values(x: list[list[Any]], solved: Solved) -> IntArray:
    if not solved.found:
        return np.zeros((len(x), len(x[0])), dtype=np.int64)
    return np.array([[round(float(variable.value() or 0.0)) for variable in row] for row in x], dtype=np.int64)
