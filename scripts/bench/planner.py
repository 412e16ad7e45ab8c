"""Aims: at 256 experts and 64 ranks, the least-loaded plan of a layer takes at most 200 µs on the host, and the best
split of rows over copies at most 100 µs. RESULTS.md says where they are missed.

    python -m scripts.bench.planner

Zipf loads with noise, 128k rows a rank. The assigners of a table take turns, and a ratio is the median of the rounds'.
Also shown: how many experts visit, what is left of the imbalance, and how many rows leave their node.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from placement import LoadTrace, Packed, Placement, RoundRobin, Topology
from routing import (
    DECIDERS,
    Assigner,
    Assignment,
    AtHome,
    LeastLoaded,
    LeastLoadedOnDevice,
    NearestCopy,
    Waterfill,
    python_only,
)
from scripts.bench import llep
from scripts.bench.measured import Measured, shared
from scripts.bench.table import cpu_seconds, finish, interleaved, median_ratio, parser, rounds, show

Table = NDArray[np.int64]
SIZES = ((128, 8), (256, 8), (256, 32), (256, 64), (384, 64))
PLANS = {"plan-128x8": (128, 8), "plan-256x8": (256, 8), "plan-384x64": (384, 64)}
SLOTS = ((256, 32, 288), (256, 64, 320), (384, 64, 448))
SKEWS = (0.5, 0.8, 1.2)
FLATTER = (0.1, 0.5, 1.2)
ROUNDS = 100


@dataclass(frozen=True)
class OnHost:
    """The decision on the device, timed here on a CPU, as an Assigner."""

    decider: LeastLoadedOnDevice

    def __call__(self, count_RE: Table, placement: Placement) -> Assignment:
        quota_RE = self.decider(torch.from_numpy(count_RE), torch.from_numpy(placement.home_E))
        return Assignment(count_RE=count_RE, quota_RE=quota_RE.numpy())


@dataclass(frozen=True)
class InPython:
    """Without the compiled path, whether or not it is built."""

    assigner: Assigner

    def __call__(self, count_RE: Table, placement: Placement) -> Assignment:
        with python_only():
            return self.assigner(count_RE, placement)


def main() -> None:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    print(f"planners: {DECIDERS.in_use()}")
    heads = ["experts", "ranks", "assigner", "µs", "× the first", "visits", "peak/mean"]
    rows = [row for num_experts, ranks in SIZES for row in lending(num_experts, ranks)]
    show(f"Least-loaded planners, one thread, median of {ROUNDS}; Zipf {SKEWS}", heads, rows)
    heads = ["experts", "ranks", "slots", "assigner", "µs", "× the first", "peak/mean", "rows that leave their node"]
    rows = [row for size in SLOTS for row in sharing(*size)]
    show(f"Rows over copies, nodes of 8 ranks, one thread, median of {ROUNDS}; Zipf {FLATTER}", heads, rows)
    finish(given)


def lending(num_experts: int, ranks: int) -> list[list[object]]:
    """Each expert lives once, and visits."""
    topology = Topology.fitting(num_experts=num_experts, ranks=ranks, ranks_per_node=8)
    placement = RoundRobin().place(num_experts, topology)
    host = LeastLoaded(headroom=1.05, min_chunk=1024)
    nodes = LeastLoaded(headroom=1.05, min_chunk=1024, node_R=topology.node_R)
    assigners: dict[str, Assigner] = {
        "LeastLoaded": host,
        "again": host,
        "LeastLoaded, in Python": InPython(host),
        "LeastLoaded, 8 ranks a node": nodes,
        "LeastLoaded, 8 ranks a node, in Python": InPython(nodes),
        "LeastLoadedOnDevice, on CPU": OnHost(LeastLoadedOnDevice(headroom=1.05, min_chunk=1024)),
        "AtHome": AtHome(),
    }
    cases = [(zipf(num_experts, ranks, skew), placement) for skew in SKEWS]
    return [
        [
            num_experts,
            ranks,
            name,
            *timed,
            listed([len(plan.loans(placement)) for plan in plans], 0),
            listed(map(peak, plans)),
        ]
        for name, timed, plans in measured(assigners, cases)
    ]


def sharing(num_experts: int, ranks: int, slots: int) -> list[list[object]]:
    """Copies placed for this load, for one that has drifted since, or many by chance; no expert visits."""
    spare = slots - num_experts
    topology = Topology.fitting(num_experts=num_experts, ranks=ranks, ranks_per_node=8, spare=spare)
    node_R, rng, rows = topology.node_R, np.random.default_rng(0), []
    assigners: dict[str, Assigner] = {
        "AtHome": AtHome(),
        "again": AtHome(),
        "NearestCopy": NearestCopy(),
        "NearestCopy, nodes": NearestCopy(node_R=node_R),
        "Waterfill": Waterfill(),
        "Waterfill, nodes": Waterfill(node_R=node_R),
    }
    counts = [zipf(num_experts, ranks, skew) for skew in FLATTER]
    placed: dict[str, Callable[[Table], Placement]] = {
        f"{slots}, for this load": lambda load_E: packed(load_E, topology),
        f"{slots}, before a drift": lambda load_E: packed(
            load_E * np.exp(0.3 * rng.normal(size=num_experts)), topology
        ),
        f"{2 * num_experts}, by chance": lambda _: by_chance(num_experts, ranks, rng),
    }
    for name, place in placed.items():
        cases = [(count_RE, place(count_RE.sum(axis=0))) for count_RE in counts]
        for assigner, timed, plans in measured(assigners, cases):
            away = listed(crossing(plan, node_R) for plan in plans)
            rows.append([num_experts, ranks, name, assigner, *timed, listed(map(peak, plans)), away])
    return rows


def suite(
    names: Sequence[str], seconds: float, count: int, *, kinds: Sequence[str], their: str | None
) -> Iterator[Measured]:
    """LeastLoaded's plans of the named sizes, experts at home in order, within so many seconds: for the suite. The
    floor is what any assigner takes, the peers are LeastLoaded in Python and LLEP's planner, where `their` names it."""
    torch.set_num_threads(1)
    ours, absent, theirs = (
        LeastLoaded(headroom=1.05, min_chunk=1024),
        {"LLEP": "--llep PATH names your copy of it"},
        None,
    )
    if their:
        try:
            theirs, absent = llep.planner_at(their, headroom=1.05, min_chunk=1024), {}
        except ValueError as error:
            absent["LLEP"] = str(error)
    sizes = {name: size for name, size in PLANS.items() if name in names}
    for (name, num_experts, ranks), budget in shared(seconds, {(name, *size): 1.0 for name, size in sizes.items()}):
        placement = Placement(expert_RS=np.arange(num_experts).reshape(ranks, -1))
        counts = [zipf(num_experts, ranks, skew) for skew in SKEWS]
        runs: dict[str, Callable[[Table], object]] = {
            who: partial(_plan, assigner, placement)
            for who, assigner in (
                ("floor", AtHome()), ("ours", ours), ("again", ours), ("in Python", InPython(ours))
            )
        }  # fmt: skip
        said = f"max/mean ours {listed(peak(ours(count_RE, placement)) for count_RE in counts)}"
        if theirs is not None:
            runs["LLEP"] = partial(_sum_and_plan, theirs, ranks)
            their_peak = listed(llep.peak(runs["LLEP"](count_RE)) for count_RE in counts)
            said += f", LLEP {their_peak}"
        timed = {who: cpu_seconds(partial(_each, run, counts), repeats=60) for who, run in runs.items()}
        samples = interleaved(timed, max(count, 20), budget=budget)
        of_one = {who: [each / len(counts) for each in taken] for who, taken in samples.seconds.items()}
        what = f"Zipf {', '.join(map(str, SKEWS))}: of one plan"
        yield Measured(
            workload=name,
            what=what,
            clock="CPU",
            seconds=of_one,
            foreign=samples.foreign,
            absent=absent,
            remark=said,
        )


def _plan(assigner: Assigner, placement: Placement, count_RE: Table) -> Assignment:
    return assigner(count_RE, placement)


def _sum_and_plan(theirs: llep.Plan, ranks: int, count_RE: Table) -> object:
    """LLEP's planner takes the sum over ranks, on the host: on a GPU it would also wait for the device."""
    return theirs(torch.from_numpy(count_RE.sum(axis=0)), ranks)


def _each(run: Callable[[Table], object], counts: Sequence[Table]) -> None:
    for count_RE in counts:
        run(count_RE)


def packed(load_E: NDArray[Any], topology: Topology) -> Placement:
    return Packed()(LoadTrace(load_WLE=load_E[None, None].astype(np.float64)), topology).placement_L[0]


def by_chance(num_experts: int, ranks: int, rng: np.random.Generator) -> Placement:
    """Each rank has its share of the experts, and as many again."""
    own_RS = np.arange(num_experts).reshape(ranks, -1)
    more_RS = [rng.permutation(np.delete(np.arange(num_experts), own_S))[: len(own_S)] for own_S in own_RS]
    return Placement(expert_RS=np.concatenate([own_RS, more_RS], axis=1))


def measured(
    assigners: Mapping[str, Assigner], cases: Sequence[tuple[Table, Placement]]
) -> list[tuple[str, list[str], list[Assignment]]]:
    """-> name, [µs, ratios to the first assigner], plans; one of each for every case."""
    seconds = [rounds({name: timer(assigner, *case) for name, assigner in assigners.items()}, ROUNDS) for case in cases]
    first = next(iter(assigners))
    return [
        (
            name,
            [
                listed([1e6 * statistics.median(times[name]) for times in seconds], 0),
                listed([median_ratio(times[name], times[first]) for times in seconds]),
            ],
            [assigner(*case) for case in cases],
        )
        for name, assigner in assigners.items()
    ]


def timer(assigner: Assigner, count_RE: Table, placement: Placement) -> Callable[[], float]:
    def seconds() -> float:
        for _ in range(4):  # the one before has left the caches full of its own tables
            assigner(count_RE, placement)
        start = time.perf_counter()
        assigner(count_RE, placement)
        return time.perf_counter() - start

    return seconds


def peak(plan: Assignment) -> float:
    return float(plan.load_R.max() / plan.load_R.mean())


def crossing(plan: Assignment, node_R: Sequence[int]) -> float:
    """The share of rows that are computed on another node than they come from."""
    flow_RR = plan.flow_RRE().sum(axis=2)
    return float(flow_RR[np.not_equal.outer(node_R, node_R)].sum() / flow_RR.sum())


def zipf(num_experts: int, ranks: int, skew: float) -> Table:
    rng = np.random.default_rng(0)
    share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1) ** skew)
    share_E /= share_E.sum()
    return np.stack([rng.multinomial(131072, rng.dirichlet(share_E * 200 * num_experts)) for _ in range(ranks)])


def listed(values: Iterable[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    main()
