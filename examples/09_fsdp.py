"""Experts over some ranks, FSDP2 over all: trained, clipped, checkpointed, and read back with another number of ranks.

    python examples/09_fsdp.py                                        one process, plain tensors
    torchrun --standalone --nproc-per-node 4 examples/09_fsdp.py     experts on two ranks, each sharded over two

Both print the same losses and norms, and what the second saved, the first could load.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe import MoE, MoEConfig, clip_grad_norm, settle_prices
from moe.integrations.fsdp import parallelize_experts, shard
from routing import LeastLoaded, LossFree

CONFIG = MoEConfig(dim=16, hidden=32, num_experts=8, top_k=2, assigner=LeastLoaded(), balancer=LossFree(step=0.01))


class Block(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + self[1](self[0](x))  # type: ignore[no-any-return]


def build(ranks: int, ep: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(nn.LayerNorm(16), MoE(CONFIG)) for _ in range(2)))
    if ranks > 1:
        world = init_device_mesh("cpu", (ranks,))
        mesh = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("efsdp", "ep"))
        parallelize_experts(model, mesh["ep"])
        for block in model:
            shard(block, mesh=world, expert_mesh=mesh["efsdp"])
        fully_shard(model, mesh=world)
    return model


def main() -> None:
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if ranks > 1:
        dist.init_process_group("gloo")
    model = build(ranks, ep=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).chunk(ranks)[rank]
    for step in range(5):
        optimiser.zero_grad()
        loss = (model(x) - x.sin()).square().mean()
        loss.backward()
        norm = clip_grad_norm(model, 0.03)  # every expert counted once
        optimiser.step()
        settle_prices(model)
        mean = loss.detach() / ranks  # every rank has as many tokens
        if ranks > 1:
            dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item():.4f}, norm {norm.item():.4f}")
    if ranks > 1:
        wider = build(ranks, ep=4)  # every rank has two experts to itself
        with tempfile.TemporaryDirectory() as own:
            dist.broadcast_object_list(folder := [own])
            save(model.state_dict(), checkpoint_id=folder[0])
            state = wider.state_dict()
            load(state, checkpoint_id=folder[0])
            dist.barrier()  # before the folder goes, all have read it
        wider.load_state_dict(state)
        assert torch.allclose(wider(x), model(x), atol=1e-5)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
