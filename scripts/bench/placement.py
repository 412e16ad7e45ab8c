"""Do the planners keep what they promise? Balance and speed beside EPLB, held-out batches, hops under a cap, drift.

    python -m scripts.bench.placement [--data DIR] [--eplb PATH_TO_A_COPY_OF/eplb.py]

Without --data only generated loads are used; without --eplb, EPLB is our drop-in of it, and no speed is compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from placement import LoadTrace, Packed, Placement, Plan, Planner, RoundRobin, Topology, merge
from placement.affinity import Affinity
from placement.eplb import rebalance_experts
from placement.formats import read_trace
from placement.groups import PricedGroups, StrictGroups, stray_L
from placement.ilp import Ilp
from placement.metrics import fan_out, local_share, moves_L, peak_over_mean, peak_over_mean_L, rank_load_WLR
from placement.rebalance import Rebalance
from placement.robust import Robust

Table = Callable[[Any, int, int, int, int], tuple[Any, Any, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with deepseek_v2_lite_top6.npz and gpt_oss_20b_top4.npz")
    parser.add_argument("--eplb", type=Path, help="your copy of DeepSeek's eplb.py")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    eplb = reference(arguments.eplb) if arguments.eplb else rebalance_experts
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}; EPLB: "
          f"{'reference' if arguments.eplb else 'our drop-in'}\n")  # fmt: skip
    against_eplb(eplb, arguments.repeats, arguments.eplb is not None)
    priced_groups()
    drift()
    if arguments.data:
        held_out(arguments.data, eplb)
        hops(arguments.data)


def reference(path: Path) -> Table:
    spec = importlib.util.spec_from_file_location("eplb", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch

    def call(weight: Any, *sizes: int) -> tuple[Any, Any, Any]:
        tables = module.rebalance_experts(torch.from_numpy(np.asarray(weight)), *sizes)
        return tables[0].numpy(), tables[1].numpy(), tables[2].numpy()

    return call


def rows(title: str, head: tuple[str, ...], body: list[tuple[Any, ...]]) -> None:
    print(f"### {title}\n\n| {' | '.join(head)} |\n|{'-|' * len(head)}")
    for row in body:
        print(f"| {' | '.join(f'{cell:.4f}' if isinstance(cell, float) else str(cell) for cell in row)} |")
    print()


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def loads() -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """58 layers x 256 experts, as DeepSeek-V3 has."""
    random = np.random.default_rng(0)
    zipf = 1 / np.arange(1, 257.0)
    return {
        "lognormal 0.6": random.lognormal(0, 0.6, (58, 256)),
        "lognormal 1": random.lognormal(0, 1, (58, 256)),
        "Zipf 0.8": np.stack([random.permutation(zipf**0.8) for _ in range(58)]),
        "Zipf 1.2": np.stack([random.permutation(zipf**1.2) for _ in range(58)]),
    }


def machine(slots: int, ranks: int, ranks_per_node: int) -> Topology:
    """Slots for 256 experts and their copies, dealt over the ranks."""
    return Topology.fitting(num_experts=256, ranks=ranks, ranks_per_node=ranks_per_node, spare=slots - 256)


def against_eplb(eplb: Table, repeats: int, compare_speed: bool) -> None:
    body: list[tuple[Any, ...]] = []
    for name, load_LE in loads().items():
        for slots, ranks in ((288, 32), (320, 64), (288, 72), (288, 64)):
            trace, topology = LoadTrace(load_WLE=load_LE[None]), machine(slots, ranks, 8)
            ours, theirs, peak = [], [], float("nan")
            for _ in range(repeats):
                plan, seconds = timed(partial(Packed(), trace, topology))
                ours.append(seconds)
                if slots % ranks == 0:
                    (phy2log, _, _), seconds = timed(partial(eplb, load_LE, slots, 1, 1, ranks))
                    theirs.append(seconds)
                    peak = flat_peak(phy2log, load_LE, ranks)
            own = float(peak_over_mean_L(plan, load_LE, topology).mean())
            bound = float(np.mean([certificate.bound for certificate in plan.certificate_L]))
            faster = f"{statistics.median(theirs) / statistics.median(ours):.1f}" if theirs and compare_speed else "-"
            seconds_ms = f"{1e3 * statistics.median(ours):.0f} ms"
            body.append((name, f"{slots}/{ranks}", peak if theirs else "refused", own, bound, faster, seconds_ms))
    head = ("load", "slots/ranks", "EPLB peak/mean", "Packed", "bound", "times faster", "Packed takes")
    rows("Packed beside EPLB, 58 layers x 256 experts, medians of interleaved runs", head, body)


def flat_peak(phy2log: Any, load_LE: Any, ranks: int) -> float:
    """EPLB may put an expert twice on a rank, which a Placement refuses: judged on its own table."""
    copies_LE = np.stack([np.bincount(row, minlength=load_LE.shape[1]) for row in phy2log])
    slot_LP = np.take_along_axis(load_LE / copies_LE, phy2log, axis=1)
    return float(peak_over_mean(slot_LP.reshape(len(phy2log), ranks, -1).sum(axis=2), (1.0,) * ranks).mean())


def priced_groups() -> None:
    trace = LoadTrace(load_WLE=loads()["lognormal 1"][None, :12])
    topology = machine(320, 64, 16)
    body: list[tuple[Any, ...]] = []
    planners: dict[str, Planner] = {"flat": Packed(), "strict": StrictGroups(groups=8)}
    planners |= {f"price {price}": PricedGroups(groups=8, price=price) for price in (0.02, 0.1, 0.5)}
    for name, planner in planners.items():
        plan = planner(trace, topology)
        peak = float(peak_over_mean_L(plan, trace.load_LE, topology).mean())
        body.append((name, peak, float(stray_L(plan.placement_L, trace.load_LE, topology, 8).mean())))
    rows("8 groups on 4 nodes, 320/64, lognormal 1", ("groups", "peak/mean", "load away from its group's node"), body)


def drift() -> None:
    random = np.random.default_rng(1)
    before = LoadTrace(load_WLE=loads()["lognormal 1"][None, :12])
    after = LoadTrace(load_WLE=before.load_WLE * random.lognormal(0, 0.25, before.load_WLE.shape))
    topology = machine(288, 32, 8)
    start, anew = Packed()(before, topology), Packed()(after, topology)
    body: list[tuple[Any, ...]] = []
    plans = {f"budget {most}": Rebalance(start=start, most_moves=most)(after, topology) for most in (8, 16, 32, 60)}
    for name, plan in {"stay": start, **plans, "plan anew": anew}.items():
        peak = float(peak_over_mean_L(plan, after.load_LE, topology).mean())
        body.append((name, peak, int(moves_L(start, plan).max())))
    rows("A drifting load, 288/32", ("", "peak/mean", "most fetches of a layer"), body)


def held_out(data: Path, eplb: Table) -> None:
    """Single-task batches of 1,024 tokens: every second one fits, the others judge."""
    trace = read_trace(data / "deepseek_v2_lite_top6.npz")
    halves = [trace.select([window]).windowed(1024).split() for window in range(trace.windows)]
    fit, held = (merge([half[index] for half in halves]) for index in (0, 1))
    topology = Topology.even(ranks=8, slots=8, ranks_per_node=8)
    relative_LE = sum(half[0].load_LE / half[0].load_LE.sum(axis=1, keepdims=True) for half in halves)
    table = eplb(relative_LE, 64, 1, 1, 8)[0]
    plans = {
        "dealt round": RoundRobin()(fit, topology),
        "EPLB": Plan(placement_L=tuple(Placement(expert_RS=row.reshape(8, 8)) for row in table)),
        "Packed": Packed()(fit, topology),
        "Robust": Robust()(fit, topology),
    }
    body: list[tuple[Any, ...]] = []
    for name, plan in plans.items():
        peak_W = peak_over_mean(rank_load_WLR(plan, held.load_WLE), topology.speed_R).mean(axis=1)
        tasks = [float(peak_W[[own == task for own in held.name_W]].mean()) for task in trace.name_W]
        body.append((name, *tasks, float(np.mean(tasks))))
    rows("DeepSeek-V2-Lite, held-out batches of one task, 64 slots on 8 ranks", ("", *trace.name_W, "mean"), body)


def hops(data: Path) -> None:
    for name in ("deepseek_v2_lite_top6", "gpt_oss_20b_top4"):
        trace = read_trace(data / f"{name}.npz")
        planners: dict[str, Any] = {
            "dealt round": RoundRobin(),
            "affinity alone": Affinity(),
            "cap 1.20": Affinity(balance_cap=1.2),
            "cap 1.05": Affinity(balance_cap=1.05),
            "cap 1.05, blocks by HiGHS": Ilp(balance_cap=1.05, seconds=60),
        }
        if trace.windows > 1:
            planners["cap 1.05 in each task"] = Affinity(balance_cap=1.05, most_scenarios=trace.windows)
        body = [(what, *hop_scores(planner, trace, 8)) for what, planner in planners.items()]
        for what, fan in (("cap 1.05, told of the nodes", 0.0), ("the same, and fan-out", 1.0)):
            body.append((what, *hop_scores(Affinity(balance_cap=1.05, fan_out=fan), trace, 4)))
        head = (
            "",
            "hops that stay",
            "bound",
            "worst layer",
            "worst task",
            "ranks a token",
            "nodes (2 x 4)",
            "planning",
        )
        rows(f"{name}: hops on 8 ranks", head, body)


def hop_scores(planner: Planner, trace: LoadTrace, ranks_per_node: int) -> tuple[Any, ...]:
    assert trace.follow_LEE is not None
    assert trace.expert_TLK is not None
    topology = Topology.even(ranks=8, slots=trace.num_experts // 8, ranks_per_node=ranks_per_node)
    plan, seconds = timed(lambda: planner(trace, topology))
    bound = plan.provenance.get("local_bound", "-")
    worst = float(peak_over_mean_L(plan, trace.load_LE, topology).max())
    reach = [fan_out(plan, trace.expert_TLK, group) for group in (range(8), (0, 0, 0, 0, 1, 1, 1, 1))]
    task = float(peak_over_mean(rank_load_WLR(plan, trace.load_WLE), topology.speed_R).mean(axis=1).max())
    return local_share(plan, trace.follow_LEE, range(8)), bound, worst, task, *reach, f"{seconds:.1f} s"


if __name__ == "__main__":
    main()
