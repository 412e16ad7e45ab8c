"""Claim: on a CPU one expert at a time is no slower than a grouped matmul, but at very few rows an expert.

    python -m scripts.bench.crossover [--rounds 5]

One thread, CPU seconds, both without the compiled path. It is why `Fastest` takes `Loop` on CPUs.
"""

from __future__ import annotations

import argparse

import torch

from moe import Grouped, Loop
from scripts.bench.experts import TYPES, Bench, Workload, measure
from scripts.bench.table import in_python, median_ratio, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    count = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    for num_experts, dim, hidden in ((64, 512, 1024), (128, 1024, 512)):
        for dtype in TYPES:
            for per_expert in (1, 8, 32, 128, 256):
                load = Workload(
                    tokens=num_experts * per_expert // 8, dim=dim, hidden=hidden, experts=num_experts, top_k=8
                )
                ratios = []
                for backward in (False, True):
                    bench = Bench(load, dtype, backward=backward)
                    runs = {
                        "floor": bench.floor(),
                        "loop": in_python(bench.run(Loop())),
                        "grouped": in_python(bench.run(Grouped())),
                    }
                    seconds = measure(runs, count)[0].seconds
                    ratios.append(median_ratio(seconds["grouped"], seconds["loop"]))
                rows.append([num_experts, dim, hidden, str(dtype).removeprefix("torch."), per_expert, *ratios])
    heads = ["experts", "dim", "hidden", "type", "rows an expert", "forward", "forward + backward"]
    show("Grouped ÷ Loop, CPU time (below 1: Grouped is faster)", heads, rows)


if __name__ == "__main__":
    main()
