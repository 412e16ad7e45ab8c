"""Claim: below some number of rows an expert, one grouped matmul beats a loop of matmuls; `Fastest` switches there.

    python -m scripts.bench.experts

One thread, CPU seconds of the process, so other work on the machine matters little.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moe import Experts, Grouped, Loop
from moe.experts import Compute, Stack
from scripts.bench.table import median_ratio, rounds, show

SHAPES = ((64, 512, 1024), (128, 1024, 512))
ROWS = (8, 32, 128, 256)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for num_experts, dim, hidden in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for per_expert in ROWS:
                if num_experts * per_expert > 16384:
                    continue
                ratios = [
                    measure(num_experts, dim, hidden, per_expert, dtype, backward=backward)
                    for backward in (False, True)
                ]
                rows.append([num_experts, dim, hidden, str(dtype).removeprefix("torch."), per_expert, *ratios])
    heads = ["experts", "dim", "hidden", "type", "rows an expert", "forward", "forward + backward"]
    show("Grouped ÷ Loop, CPU time (below 1: Grouped is faster)", heads, rows)


def measure(num_experts: int, dim: int, hidden: int, per_expert: int, dtype: torch.dtype, *, backward: bool) -> float:
    experts = Experts(dim, hidden, range(num_experts), dtype=dtype)
    x = torch.randn(num_experts * per_expert, dim, dtype=dtype, requires_grad=True)
    sizes = [per_expert] * num_experts
    none = Stack(experts.up.detach()[:0], experts.down.detach()[:0], None, None)

    def run(compute: Compute) -> Callable[[], float]:
        def once() -> float:
            experts.compute = compute
            experts.zero_grad(set_to_none=True)
            start = time.process_time()
            with torch.set_grad_enabled(backward):
                out = experts(x, sizes, experts.stack(), none)
            if backward:
                out.backward(torch.ones_like(out))
            return time.process_time() - start

        return once

    seconds = rounds({"loop": run(Loop()), "grouped": run(Grouped())}, 3)
    return median_ratio(seconds["grouped"], seconds["loop"])


if __name__ == "__main__":
    main()
