"""Claim: the least-loaded plan of a layer takes at most 200 µs on the host at 256 experts and 64 ranks.

    python -m scripts.bench.planner

Zipf loads with noise, 128k rows a rank. Also shown: how many experts visit, and what the plan leaves of the imbalance.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from numpy.typing import NDArray

from placement import RoundRobin, Topology
from routing import LeastLoaded
from scripts.bench.table import show

SIZES = ((128, 8), (256, 8), (256, 32), (256, 64), (384, 64))
SKEWS = (0.5, 0.8, 1.2)


def main() -> None:
    rows = []
    for num_experts, ranks in SIZES:
        topology = Topology.fitting(num_experts=num_experts, ranks=ranks, ranks_per_node=8)
        placement = RoundRobin().place(num_experts, topology)
        for name, node_R in (("one node", ()), ("8 ranks a node", topology.node_R)):
            assigner = LeastLoaded(headroom=1.05, min_chunk=1024, node_R=node_R)
            seconds, loans, before, after = [], [], [], []
            for skew in SKEWS:
                count_RE = zipf(num_experts, ranks, skew)
                seconds.append(median_seconds(lambda: assigner(count_RE, placement)))  # noqa: B023
                plan = assigner(count_RE, placement)
                home_R = np.bincount(placement.home_E, count_RE.sum(axis=0), minlength=ranks)
                loans.append(len(plan.loans(placement)))
                before.append(home_R.max() / home_R.mean())
                after.append(plan.load_R.max() / plan.load_R.mean())
            rows.append(
                [
                    num_experts,
                    ranks,
                    name,
                    listed(np.array(seconds) * 1e6, 0),
                    listed(loans, 0),
                    listed(before),
                    listed(after),
                ]
            )
    heads = ["experts", "ranks", "nodes", "µs", "visits", "peak/mean at home", "peak/mean planned"]
    show(f"Least-loaded planner, one thread, median of 200; Zipf {SKEWS}", heads, rows)


def zipf(num_experts: int, ranks: int, skew: float) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1) ** skew)
    share_E /= share_E.sum()
    return np.stack([rng.multinomial(131072, rng.dirichlet(share_E * 200 * num_experts)) for _ in range(ranks)])


def median_seconds(call: object) -> float:
    assert callable(call)
    samples = []
    for _ in range(200):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def listed(values: object, digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in np.asarray(values).tolist())


if __name__ == "__main__":
    main()
