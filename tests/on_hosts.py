"""A rank of a small training run on hosts of their own: python -m tests.on_hosts STEPS SECONDS. Says every step.

Only the launcher's variables tell it who it is (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from moe import MoE, MoEConfig, average_expert_grads, nodes_of
from routing import LeastLoaded


def main(steps: int, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    group = dist.group.WORLD
    node_R = nodes_of(group)
    print(f"nodes {list(node_R)}", flush=True)
    torch.manual_seed(0)
    layer = MoE(MoEConfig(dim=16, hidden=32, num_experts=8, top_k=2, assigner=LeastLoaded(node_R=node_R)), group)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x_TD = torch.randn(32, 16, generator=generator) + 1
        loss = (layer(x_TD) - x_TD.tanh()).square().mean()
        loss.backward()
        average_expert_grads(layer, group)
        for parameter in layer.router.parameters():
            dist.all_reduce(parameter.grad)
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step}: {loss.item().hex()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
