"""One call to an integer-programming solver, and an honest reading of what it says: PuLP on HiGHS, on CBC without it.

PuLP's own status calls a run that hit its time limit optimal. What was proved is read from the solution's status and
from the solver's dual bound.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulp


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A minimised programme. bound: nothing is below it. proved: the gap is closed. found: there is a solution."""

    found: bool
    proved: bool
    infeasible: bool
    value: float
    bound: float
    solver: str

    @property
    def status(self) -> str:
        if self.infeasible:
            return "infeasible"
        if not self.found:
            return f"no solution found, bound {self.bound:.6g}"
        if self.proved:
            return "optimal"
        gap = (self.value - self.bound) / abs(self.bound) if self.bound else float("inf")
        return f"feasible, gap {100 * gap:.3g} %"


def minimise(problem: pulp.LpProblem, seconds: float, seed: int) -> Solved:
    """Solve in place; the variables then hold the solution, if one was found. One thread, so that runs repeat.

    A run repeats to the bit unless the time limit ends it.
    """
    if problem.sense != pulp.LpMinimize:
        raise ValueError("minimise takes a minimisation; negate the objective")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"the time limit must be a positive number of seconds; got {seconds}")
    highs = pulp.HiGHS(msg=False, timeLimit=seconds, threads=1, gapRel=0.0, gapAbs=0.0, random_seed=seed % 2**31)
    if highs.available():
        return _highs(problem, highs)
    return _cbc(problem, seconds, seed)


def _highs(problem: pulp.LpProblem, solver: Any) -> Solved:
    problem.solve(solver)
    info = problem.solverModel.getInfo()
    return _read(problem, float(info.mip_dual_bound), "HiGHS")


def _cbc(problem: pulp.LpProblem, seconds: float, seed: int) -> Solved:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        options = [f"RandomS {seed % 2**31}", f"RandomC {seed % 2**31}"]
        with warnings.catch_warnings():
            # PuLP 3 bundles CBC and warns that 4 will not.
            warnings.simplefilter("ignore", DeprecationWarning)
            solver = pulp.PULP_CBC_CMD(
                msg=False,
                timeLimit=seconds,
                threads=1,
                gapRel=0.0,
                gapAbs=0.0,
                logPath=str(log),
                options=options,
            )
        problem.solve(solver)
        bounds = re.findall(r"Lower bound:\s+(-?[\d.]+(?:[eE][-+]?\d+)?)", log.read_text(errors="replace"))
    bound = float(bounds[-1]) if bounds else float("-inf")
    if not bounds and problem.sol_status == pulp.LpSolutionOptimal:
        bound = float(pulp.value(problem.objective))
    return _read(problem, bound, "CBC")


def _read(problem: pulp.LpProblem, bound: float, solver: str) -> Solved:
    found = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    value = float(pulp.value(problem.objective)) if found else float("inf")
    # "Solution found" after a time-out is not "optimal solution found"; and the gap itself has the last word.
    closed = value - bound <= 1e-6 * max(abs(value), 1e-9)
    return Solved(
        found=found,
        proved=found and closed and problem.sol_status == pulp.LpSolutionOptimal,
        infeasible=problem.sol_status == pulp.LpSolutionInfeasible,
        value=value,
        bound=min(bound, value),
        solver=solver,
    )
