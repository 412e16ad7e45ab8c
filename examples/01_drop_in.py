"""A model with an expert-parallel layer in it, trained for a few steps.

    python examples/01_drop_in.py                                          one process
    torchrun --standalone --nproc-per-node 4 examples/01_drop_in.py       experts spread over four

Both print the same losses: where experts live changes nothing but memory and time.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe import MoE, MoEConfig, average_expert_grads, clip_grad_norm, leave_experts_alone

TOKENS, DIM, STEPS = 64, 32, 5


class Block(nn.Module):
    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.moe = MoE(MoEConfig(dim=DIM, hidden=64, num_experts=8, top_k=2), group)  # in place of a feed-forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.moe(self.norm(x))
        return y


def main() -> None:
    group = None
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)

    torch.manual_seed(0)  # the same on every rank: an expert's weights depend on this and its id
    block = Block(group)
    model = DistributedDataParallel(leave_experts_alone(block)) if group else block
    optimiser = torch.optim.AdamW(block.parameters(), lr=1e-2)

    x = torch.randn(TOKENS, DIM)
    target = x.roll(1, dims=-1).tanh()
    mine = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    for step in range(STEPS):
        optimiser.zero_grad()
        loss = (model(x[mine]) - target[mine]).square().mean()
        loss.backward()
        if group:
            average_expert_grads(block, group)
        norm = clip_grad_norm(block, 1.0)
        optimiser.step()
        mean = loss.detach()
        if group:
            dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / ranks:.5f}, gradient norm {norm.item():.5f}")
    if group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
