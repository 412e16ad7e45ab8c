"""Claim: which balancer is best at what, by training the same model with each.

    python -m scripts.bench.training -o out/training             # an hour on one core; goes on where it stopped
    python -m scripts.bench.training -o out/training --steps 50  # a look

Every run is one of scripts.train in one process; held-out perplexity is a byte's, MaxVio of a step the mean over
layers. switch-4 and global-4 take their step in four micro-batches: in one, the two losses are the same. The time of a
step is measured apart, candidates in turn, as a ratio to the loss-controlled method, `switch`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.bench.table import machine, median_ratio, rounds
from scripts.text import split_by_file
from scripts.train import BALANCE, Run, Trainer, small, train


class Size(NamedTuple):
    experts: int
    top_k: int
    steps: int
    seeds: tuple[int, ...]


SIZES = {"16x4": Size(16, 4, 700, (0, 1, 2)), "64x8": Size(64, 8, 500, (0,))}
METHODS = {name: (name, 1) for name in BALANCE if name != "global"}
METHODS |= {"switch-4": ("switch", 4), "global-4": ("global", 4)}
PAPER = "switch"


def run_of(method: str, size: Size, *, steps: int, seed: int = 0) -> Run:
    balance, micro_batches = METHODS[method]
    shape = small(balance, experts=size.experts, top_k=size.top_k)
    return Run(shape=shape, steps=steps, seed=seed, micro_batches=micro_batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="fewer than the 700 and 500 of the table")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing, two steps each")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(machine())
    for size in arguments.sizes:
        for seed in SIZES[size].seeds:
            for method in METHODS:
                folder = arguments.output / size / method / str(seed)
                if not (folder / "result.json").exists():
                    run = run_of(method, SIZES[size], steps=arguments.steps or SIZES[size].steps, seed=seed)
                    train(Trainer(run, None), folder)
        print_table(size, arguments.output / size, step_ratios(SIZES[size], arguments.rounds))
    draw(arguments.output, arguments.sizes)


def step_ratios(size: Size, count: int) -> dict[str, float]:
    """Time of a step by that of `switch`. "again" is `switch` a second time: how far from 1 chance alone takes it."""
    text, _ = split_by_file()

    def timed(trainer: Trainer) -> float:
        start = time.perf_counter()
        for _ in range(2):
            trainer.learn(text)
        return time.perf_counter() - start

    candidates: dict[str, Callable[[], float]] = {
        name: partial(timed, Trainer(run_of(method, size, steps=1000), None))
        for name, method in ({name: name for name in METHODS} | {"again": PAPER}).items()
    }
    seconds = rounds(candidates, count)
    return {name: median_ratio(seconds[name], seconds[PAPER]) for name in candidates}


def print_table(size: str, folder: Path, ratio: dict[str, float]) -> None:
    print(f"\n{size}: experts x experts a token; mean over seeds, ± half their range")
    print("| | perplexity | at standing prices | AvgMaxVio | SupMaxVio | first 10 steps | step time |")
    print("|-|-|-|-|-|-|-|")
    columns = ("perplexity", "perplexity_standing", "avg_max_vio", "sup_max_vio", "first_max_vio")
    for method in METHODS:
        results = [json.loads(path.read_text()) for path in sorted((folder / method).glob("*/result.json"))]
        cells = [_cell([result[name] for result in results]) for name in columns]
        print(f"| {method} | {' | '.join(cells)} | {ratio[method]:.3f} |")
    print(f"\n`switch` against itself: {ratio['again']:.3f}")


def draw(folder: Path, sizes: list[str]) -> None:
    """MaxVio over steps, a panel for each size, in maxvio.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(sizes), figsize=(6 * len(sizes), 4), squeeze=False)
    for axis, size in zip(axes[0], sizes):
        for method in METHODS:
            axis.plot(*_curve(folder / size / method / "0" / "log.jsonl"), label=method, linewidth=1)
        axis.set(title=size.replace("x", " experts, k = "), xlabel="step", ylabel="MaxVio of the step", yscale="log")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(folder / "maxvio.png", dpi=110)
    print(f"\n{folder / 'maxvio.png'}")


def _curve(log: Path) -> tuple[list[int], list[float]]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["step"] for line in lines], [line["readings"]["run"]["max_vio"] for line in lines]


def _cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


if __name__ == "__main__":
    main()
