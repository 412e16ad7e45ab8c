"""The fewest visits that bring every rank within its capacity, by an exact solver. The yardstick of LeastLoaded."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pulp
from numpy.typing import NDArray


def fewest_visits(load_E: NDArray[np.int64], home_E: NDArray[np.int64], ranks: int, capacity: int) -> int | None:
    """The optimum, or None if it was not proven in time. Any expert may visit any rank, from idle ranks too.

    Rows may be split at will, so with the visits chosen, whole rows are a flow, and the rows need no integer variables.
    Two bounds that every plan keeps make the proof quick (test_the_bounds_cut_off_no_plan states it): an overloaded
    rank lends at least as many experts as cover its excess; and ranks joined by visits share their loads, so each
    connected part must fit its own capacity, and R ranks in P parts need R - P visits.
    """
    problem = pulp.LpProblem("visits", pulp.LpMinimize)
    pairs = [(expert, rank) for expert in range(len(load_E)) for rank in range(ranks)]
    rows = {(e, r): problem.add_variable(f"rows_{e}_{r}", 0, int(load_E[e])) for e, r in pairs}
    visit = {(e, r): problem.add_variable(f"visit_{e}_{r}", cat="Binary") for e, r in pairs if r != home_E[e]}
    problem += pulp.lpSum(visit.values())
    for expert, load in enumerate(load_E.tolist()):
        problem += pulp.lpSum(rows[expert, rank] for rank in range(ranks)) == load
    for rank in range(ranks):
        problem += pulp.lpSum(rows[expert, rank] for expert in range(len(load_E))) <= capacity
    for (expert, rank), visits in visit.items():
        problem += rows[expert, rank] <= min(int(load_E[expert]), capacity) * visits
    for rank, lent in enumerate(fewest_lent(load_E, home_E, ranks, capacity)):
        problem += pulp.lpSum(visits for (expert, _), visits in visit.items() if home_E[expert] == rank) >= lent
    problem += pulp.lpSum(visit.values()) >= ranks - most_parts(_at_home(load_E, home_E, ranks), capacity)
    # Visits are whole, so a gap below 1 proves the optimum.
    problem.solve(pulp.HiGHS(msg=False, timeLimit=5, threads=1, gapAbs=0.99, gapRel=0.0))
    return round(pulp.value(problem.objective)) if problem.sol_status == pulp.LpSolutionOptimal else None


def fewest_lent(load_E: NDArray[np.int64], home_E: NDArray[np.int64], ranks: int, capacity: int) -> list[int]:
    """For each rank, the fewest of its experts that together have as many rows as it has too many."""
    lent_R = []
    for rank, rows in enumerate(_at_home(load_E, home_E, ranks)):
        biggest = np.sort(load_E[home_E == rank])[::-1]
        lent_R.append(int((np.cumsum(biggest) < rows - capacity).sum()) + 1 if rows > capacity else 0)
    return lent_R


def most_parts(home_R: list[int], capacity: int) -> int:
    """The most parts into which the ranks can be divided such that each part could hold its own rows."""
    subsets = 1 << len(home_R)
    members = [[rank for rank in range(len(home_R)) if subset >> rank & 1] for subset in range(subsets)]
    fits = [sum(home_R[rank] for rank in ranks) <= capacity * len(ranks) for ranks in members]
    parts = [0] + [-len(home_R)] * (subsets - 1)
    for subset in range(1, subsets):
        lowest, part = subset & -subset, subset
        while part:
            if part & lowest and fits[part]:
                parts[subset] = max(parts[subset], 1 + parts[subset ^ part])
            part = (part - 1) & subset
    return parts[-1]


def _at_home(load_E: NDArray[np.int64], home_E: NDArray[np.int64], ranks: int) -> list[int]:
    home_R = np.zeros(ranks, dtype=np.int64)
    np.add.at(home_R, home_E, load_E)
    return home_R.tolist()


def fewest_visits_by_trying(load_E: NDArray[np.int64], home_E: NDArray[np.int64], ranks: int, capacity: int) -> int:
    """The same by trying sets of visits, fewest first, for tiny cases. By Hall's theorem a set of visits suffices if no
    set of experts has more rows than the ranks that may compute them have room."""
    pairs = [(expert, rank) for expert in range(len(load_E)) for rank in range(ranks) if rank != home_E[expert]]
    return next(
        size
        for size in range(len(pairs) + 1)
        for visits in combinations(pairs, size)
        if _suffice(set(visits), load_E, home_E, capacity)
    )


def _suffice(visits: set[tuple[int, int]], load_E: NDArray[np.int64], home_E: NDArray[np.int64], capacity: int) -> bool:
    for subset in range(1, 1 << len(load_E)):
        experts = [expert for expert in range(len(load_E)) if subset >> expert & 1]
        reach = {int(home_E[expert]) for expert in experts} | {rank for expert, rank in visits if expert in experts}
        if load_E[experts].sum() > capacity * len(reach):
            return False
    return True
