"""Claim: with hot experts, a least-loaded layer is faster than one at home and keeps less on the busiest rank.

    python -m scripts.bench.layer [--ranks 2] [--loads 95:4 zipf] [--types float32] [--tokens 2048] [--rounds 5]

gloo processes of one thread each, a layer of 16 experts, top-4, dim 512, hidden 1024, over the streams of choices of
scripts/bench/loads.py. The ceiling is at-home's peak/mean: what perfect balance at no cost would gain. CPU: the CPU
seconds of each step's busiest rank, which other work on the machine disturbs less than the wall time. Peak: the most
bytes of tensors that were alive at once on the busiest rank in a step. "again" is the least-loaded layer a second time:
the noise of this run. Four processes do not fit two cores: there the CPU columns alone mean something.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from math import inf

import torch
import torch.distributed as dist
from torch import Tensor

from moe import MoE, MoEConfig, World
from moe.comm import world_group
from placement import Placement
from routing import Assigner, Assignment, AtHome, LeastLoaded, Rows, Tokens, TopK, token_major
from scripts.bench.dense import dense
from scripts.bench.loads import LOADS, Case
from scripts.bench.measured import BACKWARD, FORWARD, Measured, shared
from scripts.bench.table import Samples, against, band, finish, interleaved, median_ratio, parser, show

TOP_K = 4
CONFIG = MoEConfig(dim=512, hidden=1024, num_experts=16, top_k=TOP_K)
CANDIDATES: dict[str, Assigner] = {
    "at home": AtHome(),
    "least-loaded": LeastLoaded(headroom=1.0, min_chunk=64),
    "again": LeastLoaded(headroom=1.0, min_chunk=64),
}
ALONE = ("bal", "95:4", "zipf")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Told(TopK):
    """Every token takes what it is told: the first of the list."""

    expert_STK: list[Tensor]

    def __call__(self, score_TE: Tensor, price_E: Tensor, top_k: int, tokens: Tokens) -> Rows:
        return token_major(self.expert_STK[0])


class Bench:
    """One load on this rank: a layer of each candidate, and the tokens and choices of each step."""

    def __init__(self, name: str, dtype: torch.dtype, case: Case) -> None:
        self.expert_STK = LOADS[name].choices(case, dist.get_rank())
        self.told: list[Tensor] = [self.expert_STK[0]]
        self.x_STD = [torch.randn(len(expert_TK), CONFIG.dim, dtype=dtype) for expert_TK in self.expert_STK]
        self.layers = {who: self.build(assigner, dtype, case) for who, assigner in CANDIDATES.items()}
        self.rows = round(sum(map(len, self.x_STD)) * TOP_K)

    def build(self, assigner: Assigner, dtype: torch.dtype, case: Case) -> MoE:
        torch.manual_seed(0)
        placement = Placement(expert_RS=torch.arange(case.experts).view(case.ranks, -1).numpy())
        config = replace(CONFIG, assigner=assigner, select=Told(expert_STK=self.told))
        return MoE(config, world_group(), placement, dtype=dtype)

    def step(self, layer: MoE, backward: bool, number: int) -> Tensor:
        layer.zero_grad(set_to_none=True)
        x_TD, self.told[0] = self.x_STD[number], self.expert_STK[number]
        with torch.set_grad_enabled(backward):
            y_TD: Tensor = layer(x_TD.requires_grad_(backward))
        if backward:
            torch.autograd.backward(y_TD, torch.ones_like(y_TD))
        return y_TD.detach()

    def steps(self, layer: MoE, backward: bool) -> list[Tensor]:
        """All steps of the load once."""
        return [self.step(layer, backward, number) for number in range(len(self.x_STD))]

    def floor(self, backward: bool) -> Callable[[], None]:
        """All rows of a load as dense matmuls, equally many on each rank, and nothing sent."""
        rows = torch.tensor(self.rows)
        dist.all_reduce(rows)
        dtype = self.x_STD[0].dtype
        return dense(
            lambda *shape: torch.randn(*shape, dtype=dtype),
            int(rows) // dist.get_world_size(),
            CONFIG.dim,
            CONFIG.hidden,
            backward,
        )

    def sampled(self, backward: bool, count: int, budget: float = inf) -> dict[str, Samples]:
        """By clock, summed over the steps: the wall's, from when all ranks begin to when the last has ended, and the
        CPU's of the rank that was busiest in a step, another one in each where the load rotates."""
        runs: dict[str, list[Callable[[], object]]] = {
            who: [partial(self.step, layer, backward, number) for number in range(len(self.x_STD))]
            for who, layer in self.layers.items()
        }
        runs["floor"] = [self.floor(backward)]
        cpu: dict[str, list[float]] = {who: [] for who in runs}
        timed = {who: timer(run, cpu[who]) for who, run in runs.items()}
        wall = interleaved(timed, count, budget=budget, agree=lambda left: -busiest(-left))
        return {"wall": wall, "CPU": Samples({who: taken[1:] for who, taken in cpu.items()}, wall.foreign)}

    def plans(self, layer: MoE) -> list[Assignment]:
        plans: list[Assignment] = []
        handle = layer.observe(lambda choice, assignment: plans.append(assignment))
        outs = self.steps(layer, False)
        handle.remove()
        assert all(out.isfinite().all() for out in outs)
        return plans


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument(
        "--loads", nargs="+", choices=[*LOADS], default=[*LOADS], metavar="LOAD", help=", ".join(LOADS)
    )
    arguments.add_argument("--types", nargs="+", choices=[*TYPES], default=["float32"])
    arguments.add_argument("--tokens", type=int, default=2048, help="of each rank")
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    case = Case(ranks=given.ranks, experts=CONFIG.num_experts, top_k=TOP_K, tokens=given.tokens)
    with World(given.ranks, timeout=timedelta(minutes=20)) as world:
        measured = [
            [f"ep{given.ranks}-{name}", kind, *world.run(measure, name, TYPES[kind], case, given.rounds)[0]]
            for kind in given.types
            for name in given.loads
        ]
    tables(measured, given)
    finish(given)


def tables(measured: Sequence[Sequence[object]], given: argparse.Namespace) -> None:
    heads = ["load", "type", "ceiling", "visits", "rows that leave: at home, least-loaded"]
    what = f"Least-loaded against at home, {given.ranks} processes, {given.tokens} tokens a rank"
    times = [
        f"{kind}: {clock}"
        for kind in ("forward", "forward + backward")
        for clock in ("wall", "(noise)", "CPU", "(noise)")
    ]
    show(f"{what}: times faster", [*heads, *times, "share of the ceiling (CPU)"], [row[:14] for row in measured])
    show(
        f"{what}: memory of the busiest rank, × at home",
        ["load", "type", "peak", "kept"],
        [[*row[:2], *row[14:]] for row in measured],
    )


def measure(name: str, dtype: torch.dtype, case: Case, count: int) -> list[object]:
    bench = Bench(name, dtype, case)
    plans = {who: bench.plans(layer) for who, layer in bench.layers.items()}
    ceiling = ceiling_of(plans["at home"])
    loaned = bench.layers["least-loaded"].placement
    visits = sum(len(plan.loans(loaned)) for plan in plans["least-loaded"]) / len(plans["least-loaded"])
    leave = ", ".join(f"{share_leaving(plans[who]):.2f}" for who in ("at home", "least-loaded"))
    answer: list[object] = [ceiling, round(visits, 1), leave]
    gain = 1.0
    for backward in (False, True):
        for samples in bench.sampled(backward, count).values():
            home, ours, again = (samples.seconds[who] for who in ("at home", "least-loaded", "again"))
            gain, noise = median_ratio(home, ours), band(again, ours)
            answer += [against(gain, noise), noise]
    peak, kept = (
        {who: busiest(what(partial(bench.steps, layer, True))) for who, layer in bench.layers.items() if who != "again"}
        for what in (peak_bytes, kept_bytes)
    )
    return [
        *answer,
        gain / ceiling,
        *(bytes_of["least-loaded"] / bytes_of["at home"] for bytes_of in (peak, kept)),
    ]


def timer(steps: Sequence[Callable[[], object]], cpu: list[float]) -> Callable[[], float]:
    """Wall seconds; the CPU seconds of the same steps go to cpu."""

    def once() -> float:
        wall_S, cpu_S = [], []
        for step in steps:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            step()
            wall, own_cpu = time.perf_counter() - start, time.process_time() - start_cpu
            wall_S.append(busiest(wall))
            cpu_S.append(busiest(own_cpu))
        cpu.append(sum(cpu_S))
        return sum(wall_S)

    return once


def suite(names: Sequence[str], seconds: float, count: int, *, kinds: Sequence[str]) -> Iterator[Measured]:
    """Of loads named ep2-95:4 and the like, in fp32, within so many seconds: for the suite. Ours is least-loaded, its
    peer is at home, as any expert parallelism without balancing. 2,048 tokens, shared among the ranks; forward alone is
    measured of three loads, unless it is all that is asked for."""
    wanted = {(int(name[2]), name.split("-", 1)[1]) for name in names}
    for ranks in sorted({ranks for ranks, _ in wanted}):
        case = Case(ranks=ranks, experts=CONFIG.num_experts, top_k=TOP_K, tokens=2048 // ranks)
        weight = {
            (load, backward): LOADS[load].steps * (3.0 if backward else 1.0)
            for load in LOADS
            for backward in [kind == BACKWARD for kind in kinds]
            if (ranks, load) in wanted and (backward or load in ALONE or BACKWARD not in kinds)
        }
        share = seconds * sum(each == ranks for each, _ in wanted) / len(wanted)
        with World(ranks, timeout=timedelta(minutes=10)) as world:
            for (load, backward), budget in shared(share, weight):
                told = world.run(measure_once, load, case, backward, count, budget)[0]
                crowded = f"{ranks} ranks on {os.cpu_count()} CPUs" if ranks > (os.cpu_count() or 1) else ""
                for clock, samples in told[0].items():
                    samples.seconds["ours"] = samples.seconds.pop("least-loaded")
                    yield Measured.of(
                        samples,
                        workload=f"ep{ranks}-{load}",
                        what=f"float32, {BACKWARD if backward else FORWARD}",
                        clock=clock,
                        remark=f"ceiling {told[1]:.2f}" + (", of the busiest rank" if clock == "CPU" else ""),
                        refused=f"refused: {crowded}" if crowded and clock == "wall" else "",
                    )


def measure_once(load: str, case: Case, backward: bool, count: int, budget: float) -> tuple[dict[str, Samples], float]:
    start = time.monotonic()
    bench = Bench(load, torch.float32, case)
    ceiling = ceiling_of(bench.plans(bench.layers["at home"]))
    return bench.sampled(backward, count, budget - (time.monotonic() - start)), ceiling


def ceiling_of(plans: Sequence[Assignment]) -> float:
    """What perfect balance at no cost would gain."""
    return float(sum(plan.load_R.max() for plan in plans) / sum(plan.load_R.mean() for plan in plans))


def share_leaving(plans: Sequence[Assignment]) -> float:
    """Of all rows, those that another rank computes than the one that chose them."""
    stay = sum(int(plan.sent_by(rank)[rank].sum()) for plan in plans for rank in range(len(plan.count_RE)))
    rows = sum(int(plan.count_RE.sum()) for plan in plans)
    return 1 - stay / rows


def peak_bytes(run: Callable[[], object]) -> float:
    """The most bytes of tensors alive at once, beyond those that were alive before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return float(peak)


def kept_bytes(run: Callable[[], object]) -> float:
    """What autograd keeps from forward to backward, each storage once a step, parameters included alike."""
    kept = 0
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return float(kept)


def busiest(value: float) -> float:
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


if __name__ == "__main__":
    main()
