"""The least peak of rows split over copies: by the linear programme, and by looking at all sets of ranks."""

from __future__ import annotations

import numpy as np
import pulp
from numpy.typing import NDArray


def peak_by_programme(load_E: NDArray[np.int64], held_RE: NDArray[np.bool_]) -> float:
    """LPLB's programme, by HiGHS: the least peak over all fractional splits."""
    problem = pulp.LpProblem("peak", pulp.LpMinimize)
    peak = problem.add_variable("peak", 0)
    rows = {(r, e): problem.add_variable(f"rows_{r}_{e}", 0) for r, e in np.argwhere(held_RE).tolist()}
    problem += peak
    for expert, load in enumerate(load_E.tolist()):
        problem += pulp.lpSum(rows[r, expert] for r in np.flatnonzero(held_RE[:, expert]).tolist()) == load
    for rank, held_E in enumerate(held_RE):
        problem += pulp.lpSum(rows[rank, e] for e in np.flatnonzero(held_E).tolist()) <= peak
    problem.solve(pulp.HiGHS(msg=False, threads=1))
    assert problem.sol_status == pulp.LpSolutionOptimal
    return float(pulp.value(peak))


def peak_by_trying(load_E: NDArray[np.int64], held_RE: NDArray[np.bool_]) -> int:
    """The least peak in whole rows: over all sets of ranks, the mean of what no other rank may compute, rounded up."""
    ranks, peak = len(held_RE), 0
    for subset in range(1, 1 << ranks):
        inside_R = np.array([bool(subset >> rank & 1) for rank in range(ranks)])
        captive = int(load_E[~held_RE[~inside_R].any(axis=0)].sum())
        peak = max(peak, -(-captive // int(inside_R.sum())))
    return peak
