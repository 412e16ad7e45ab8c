"""Aim: on one H200, forward within 1.25 to 1.5 of dense matmuls of its FLOPs, and behind no peer's grouped one.

    python -m scripts.bench.gpu --json out/gpu.json            # at most 10 minutes; out/gpu.md besides
    python -m scripts.bench.gpu --device cpu --tiny            # every line of it, with times that say nothing

Needs torch, numpy and einops; without transformers its columns say so, without pytest and hypothesis the GPU tests are
not run. In order: ceilings; the tests that only a GPU can run; the layer of three published shapes under three loads;
planners, permutation and host synchronisations; each virtual rank of 8 and of 64, in turn. Candidates take turns;
medians; CUDA events. "again" is ours a second time: a difference within |again/ours - 1| is noise. When the time is up,
what is left is listed.

Nothing here says how fast many GPUs are: measured is each rank's own compute and memory, its travel is modelled.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe import MoE, MoEConfig, Planned
from moe.comm import Peers
from moe.dispatch import Dispatch
from placement import INFINIBAND, NVLINK
from routing import Assigner, AtHome, LeastLoaded, LeastLoadedOnDevice
from scripts.bench.clock import Clock, reason
from scripts.bench.published import SHAPES, TINY, Layer, Shape, experts_of
from scripts.bench.replay import Stage, counts, in_order
from scripts.bench.table import finish, parser, show

LOADS = {"balanced": "bal", "Zipf": "zipf", "hot 4": "95:4"}
COLUMNS = ("ours", "again", "Fused", "torch grouped", "HF grouped", "HF eager")
LAYER_HEADS = (
    *("shape", "load", "error", "ceiling, ms"),
    *(f"{who}, × ceiling" for who in COLUMNS),
    *("noise", "TFLOP/s, ours", "peak GiB, ours", "peak GiB, torch grouped"),
)
REPLAY_HEADS = (
    *("shape", "load", "ranks", "played", "assigner", "visits", "rows, most", "rows, mean"),
    *("compute ms, most", "compute ms, mean", "peak GiB, most", "peak GiB, mean", "travel ms, modelled", "failed"),
)
GPU_TESTS = "pytest.mark.gpu"


@dataclass(frozen=True)
class Bench:
    clock: Clock
    shapes: dict[str, Shape]
    rounds: int
    tiny: bool

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU, to see that it runs")
    arguments.add_argument("--budget", type=float, default=560.0, metavar="SECONDS", help="stop when they are over")
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args(argv)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        arguments.error("there is no CUDA device; a dry run is: --device cpu --tiny")
    torch.manual_seed(0)
    clock = Clock(torch.device(given.device), given.budget)
    bench = Bench(
        clock, TINY if given.tiny else SHAPES, min(given.rounds, 1) if given.tiny else given.rounds, given.tiny
    )
    for part in (ceilings, gpu_tests, layers, small_parts, replays):
        part(bench)
        save(given)
    show("Left out for want of time", ["what"], [[what] for what in clock.skipped] or [["nothing"]])
    save(given)


def save(given: argparse.Namespace) -> None:
    """After each part, so that a run which is cut short has left what it found."""
    finish(given)


def ceilings(bench: Bench) -> None:
    """The two numbers everything else is held against, as this device gives them."""
    width, megabytes = (64, 1) if bench.tiny else (8192, 4096)
    a, b = (torch.randn(width, width, device=bench.device, dtype=bench.dtype) for _ in range(2))
    source = torch.randn(megabytes * 2**18, device=bench.device)
    target = torch.empty_like(source)
    found = bench.clock.medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, max(bench.rounds, 1))
    rows = [
        [
            f"matmul {width}³, {name_of(bench.dtype)}",
            milliseconds(found["product"]),
            rate(2 * width**3, found["product"]),
        ],
        [f"copy of {megabytes} MiB", milliseconds(found["copy"]), rate(2 * source.nbytes, found["copy"])],
    ]
    show("Ceilings of this device", ["what", "ms", "TFLOP/s or TB/s"], rows)
    bench.clock.tidy()


def gpu_tests(bench: Bench) -> None:
    """In a process of their own: only the files that mention the mark are read, for they alone are sure to import."""
    tests = Path(__file__).parents[2] / "tests"
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or bench.device.type != "cuda" or not bench.clock.allows("the GPU tests", 60):
        why = f"not installed: {', '.join(missing)}" if missing else "no GPU, or no time"
        show("Tests that need a GPU", ["result"], [[f"not run ({why})"]])
        return
    files = [str(path) for path in sorted(tests.rglob("test_*.py")) if GPU_TESTS in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=tests.parent, timeout=150, capture_output=True, text=True, check=False)
        tail = (done.stdout + done.stderr).strip().splitlines()[-12:]
    except subprocess.TimeoutExpired:
        tail = ["not ended after 150 s"]
    show("Tests that need a GPU", ["result"], [[line.replace("|", "/")] for line in tail])


def layers(bench: Bench) -> None:
    """From the chosen experts to the summed results, one process with all its experts."""
    for backward in (False, True):
        what = "forward + backward" if backward else "forward"
        rows: list[list[object]] = []
        for name, shape in bench.shapes.items():
            experts = experts_of(shape, shape.held, bench.device, bench.dtype)
            for load, drawn in LOADS.items():
                if bench.clock.allows(f"layer {name}, {load}, {what}", 15 * bench.rounds / 7):
                    rows.append([name, load, *layer_row(bench, shape, drawn, experts, backward)])
                    bench.clock.tidy()
            del experts
            bench.clock.tidy()
        show(f"Layer, {what}, {name_of(bench.dtype)}", LAYER_HEADS, rows)


def layer_row(bench: Bench, shape: Shape, load: str, experts: Any, backward: bool) -> list[object]:
    try:
        layer = Layer(shape, load, experts, backward=backward)
        candidates = layer.candidates()
    except RuntimeError as failure:
        return [reason(failure), *["-"] * (len(LAYER_HEADS) - 3)]
    error = attempt(layer.error, lambda size: f"{size:.1e}")
    found = bench.clock.medians(candidates, bench.rounds)
    peaks = [attempt(partial(bench.clock.peak, candidates[who]), gib) for who in ("ours", "torch grouped")]
    cells = [times(found[who], found["ceiling"]) for who in COLUMNS]
    speed = rate(shape.flops(backward=backward), found["ours"])
    noise = times(found["again"], found["ours"])
    return [error, milliseconds(found["ceiling"]), *cells, noise, speed, *peaks]


def small_parts(bench: Bench) -> None:
    """What surrounds the matmuls: deciding, sorting and waiting."""
    if not bench.clock.allows("planners, permutation, synchronisations", 10):
        return
    rows: list[list[object]] = []
    many = max(3 * bench.rounds, 3)
    for num_experts, ranks in ((128, 8), (256, 8), (256, 64)):
        shape = replace(bench.shapes["qwen30"], experts=num_experts)
        count_RE, placement = counts("zipf", shape, ranks, 256), in_order(shape, ranks)
        on_device, home_E = (torch.from_numpy(table.copy()).to(bench.device) for table in (count_RE, placement.home_E))
        runs: dict[str, Callable[[], object]] = {
            "LeastLoaded, host": partial(LeastLoaded(), count_RE, placement),
            "LeastLoadedOnDevice": partial(LeastLoadedOnDevice(), on_device, home_E),
        }
        rows += parts(bench, runs, many, f"{num_experts} experts, {ranks} ranks, Zipf")
    for name, shape in bench.shapes.items():
        rows += parts(bench, around(bench, shape), bench.rounds, name)
    show("Planner, permutation, host synchronisations", ["what", "of", "ms", "host waits"], rows)


def parts(bench: Bench, runs: dict[str, Callable[[], object]], rounds: int, of: str) -> list[list[object]]:
    found = bench.clock.medians(runs, rounds)
    return [
        [what, of, milliseconds(found[what]), "-" if isinstance(found[what], str) else whole(bench.clock.syncs(run))]
        for what, run in runs.items()
    ]


def around(bench: Bench, shape: Shape) -> dict[str, Callable[[], object]]:
    """Dispatch.of and combine of a whole batch, and a small layer with its router, to count how often it waits."""
    few = replace(shape, dim=16 if bench.tiny else 1024, hidden=16)
    layer = Layer(few, "bal", experts_of(few, few.held, bench.device, bench.dtype), backward=False)
    choice, peers = layer.choice(), Peers.of(None)
    home = in_order(replace(few, experts=few.held), 1)
    assignment = AtHome()(choice.load_E.cpu().numpy()[None], home)
    dispatch = Dispatch.of(choice, assignment, list(range(few.held)), peers)
    result_MD = torch.randn(few.rows, few.dim, device=bench.device, dtype=bench.dtype)
    weight_N = choice.weight_N.detach()
    config = MoEConfig(dim=few.dim, hidden=16, num_experts=few.held, top_k=few.top_k)
    moe, planned = (kind(config, device=bench.device, dtype=bench.dtype) for kind in (MoE, Planned))
    x_TD = layer.x_TD.detach().requires_grad_()
    return {
        "permute (Dispatch.of)": lambda: Dispatch.of(choice, assignment, list(range(few.held)), peers),
        f"combine, dim {few.dim}": lambda: dispatch.total(result_MD, weight_N),
        f"MoE of dim {few.dim}, hidden 16, both ways": lambda: moe(x_TD).sum().backward(),
        f"Planned of dim {few.dim}, hidden 16, both ways": lambda: planned(x_TD).sum().backward(),
    }


def replays(bench: Bench) -> None:
    """Every virtual rank's exact buffers, at home and least-loaded, forward and backward."""
    rows: list[list[object]] = []
    for ranks, tokens in ((2, 8), (4, 8)) if bench.tiny else ((8, 8192), (64, 4096)):
        for name, shape in bench.shapes.items():
            for load in LOADS:
                if bench.clock.allows(f"replay {name}, {load}, {ranks} ranks", 4 * bench.rounds / 7):
                    rows += replay(bench, name, shape, load, ranks, tokens)
    title = (
        f"Replay of each rank in turn on one device, forward + backward: compute and memory measured, travel MODELLED "
        f"({NVLINK.latency:.0e} s + bytes / {NVLINK.bandwidth:.0e} in nodes of 8, beyond {INFINIBAND.latency:.0e} "
        f"s + bytes / {INFINIBAND.bandwidth:.0e}). It is no speed-up of many devices"
    )
    show(title, REPLAY_HEADS, rows)


def replay(bench: Bench, name: str, shape: Shape, load: str, ranks: int, tokens: int) -> list[list[object]]:
    count_RE, placement = counts(LOADS[load], shape, ranks, tokens), in_order(shape, ranks)
    chunk = max(tokens * shape.top_k // 16, 1)
    assigners: dict[str, Assigner] = {"at home": AtHome(), "least-loaded": LeastLoaded(headroom=1.05, min_chunk=chunk)}
    plans = {who: assigner(count_RE, placement) for who, assigner in assigners.items()}
    most = max(
        int(np.bincount([loan.borrower for loan in plan.loans(placement)], minlength=1).max())
        for plan in plans.values()
    )
    stage = Stage(shape, ranks, most, bench.clock, bench.dtype)
    rows: list[list[object]] = []
    for who, plan in plans.items():
        seconds = min(8.0, max(bench.clock.left / 30, 1.0))
        told = stage.play(plan, placement, seconds, backward=True)
        rows_R = told.rows_R
        counted = [name, load, ranks, len(told.seconds), who, told.loans, int(rows_R.max()), int(rows_R.mean())]
        measured = [
            worth(values, unit) for values, unit in ((told.seconds, 1e3), (told.peaks, 2**-30)) for worth in WORTH
        ]
        rows.append([*counted, *measured, f"{told.travel * 1e3:.2f}", told.failed or "-"])
    return rows


def attempt(measure: Callable[[], float], told: Callable[[float], str]) -> str:
    try:
        return told(measure())
    except RuntimeError as failure:
        return reason(failure)


def milliseconds(taken: float | str) -> str:
    return taken if isinstance(taken, str) else f"{taken * 1e3:.3f}"


def times(taken: float | str, base: float | str) -> str:
    if isinstance(taken, str) or isinstance(base, str):
        return str(taken) if isinstance(taken, str) else "-"
    return f"{taken / base:.2f}"


def rate(work: float, taken: float | str) -> str:
    return "-" if isinstance(taken, str) else f"{work / taken / 1e12:.2f}"


def gib(size: float) -> str:
    return "-" if math.isnan(size) else f"{size / 2**30:.2f}"


def whole(number: float) -> str:
    return "-" if math.isnan(number) else str(int(number))


def most_of(values: Sequence[float], unit: float) -> str:
    return "-" if not values or math.isnan(values[0]) else f"{max(values) * unit:.2f}"


def mean_of(values: Sequence[float], unit: float) -> str:
    return "-" if not values or math.isnan(values[0]) else f"{sum(values) / len(values) * unit:.2f}"


WORTH = (most_of, mean_of)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
