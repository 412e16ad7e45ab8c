"""Experts that visit the least loaded ranks: what it does to the busiest rank, and when it declines.

torchrun --standalone --nproc-per-node 4 examples/04_least_loaded.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from moe import MoE, MoEConfig, nodes_of
from routing import Assigner, Assignment, AtHome, BreakEven, LeastLoaded

CONFIG = MoEConfig(dim=32, hidden=64, num_experts=16, top_k=2)


def main() -> None:
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    nodes = nodes_of(group)  # visits within a node are preferred
    # The price of a visit, in rows: measure both numbers on your machine. These are a GPU's over a slow link.
    slow_link = BreakEven.of(flops=700e12, bandwidth=50e9)
    assigners: dict[str, Assigner] = {
        "at home": AtHome(),
        "least loaded, 5 % headroom": LeastLoaded(headroom=1.05, node_R=nodes),
        "least loaded, 50 % headroom": LeastLoaded(headroom=1.5, node_R=nodes),
        f"if a visit costs {slow_link.rows:.0f} rows": LeastLoaded(headroom=1.05, node_R=nodes, worth=slow_link),
    }
    x = torch.randn(256, CONFIG.dim, generator=torch.Generator().manual_seed(rank)) + 0.5
    for name, assigner in assigners.items():
        torch.manual_seed(0)
        layer = MoE(replace(CONFIG, assigner=assigner), group)
        plans: list[Assignment] = []
        layer.observe(lambda choice, assignment: plans.append(assignment))  # noqa: B023  # used in this round only
        layer(x)
        load_R = plans[0].load_R
        if rank == 0:
            print(
                f"{name:30} rows by rank {load_R.tolist()}, peak/mean {load_R.max() / load_R.mean():.2f}, "
                f"{len(plans[0].loans(layer.placement))} visits"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
