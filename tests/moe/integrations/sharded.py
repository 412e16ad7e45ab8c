"""A small model of two blocks, whole or sharded over the meshes of this world, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe import MoE, MoEConfig
from moe.integrations.fsdp import parallelize_experts, shard
from routing import Balancer, LeastLoaded, LossFree

DIM, EXPERTS = 8, 8


class Block(nn.Module):
    def __init__(self, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, dtype=dtype)
        self.inner = nn.Linear(DIM, DIM, dtype=dtype)
        self.moe = MoE(config, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.moe(torch.tanh(self.inner(self.norm(x))))
        return y


class Net(nn.Module):
    """checkpointing: how a block is run."""

    def __init__(self, config: MoEConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(config, dtype) for _ in range(2))
        self.run: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


def config(
    assigner: Any = LeastLoaded(headroom=1.0, min_chunk=1), balancer: Balancer = LossFree(), experts: int = EXPERTS
) -> MoEConfig:
    return MoEConfig(
        dim=DIM, hidden=12, num_experts=experts, top_k=2, shared_hidden=4, bias=True, assigner=assigner,
        balancer=balancer,
    )  # fmt: skip


def meshes(ep: int) -> tuple[DeviceMesh, DeviceMesh]:
    """-> all ranks, (efsdp, ep)"""
    ranks = dist.get_world_size()
    sparse = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("efsdp", "ep"))
    return init_device_mesh("cpu", (ranks,)), sparse


def sharded(net: Net, ep: int, **options: Any) -> Net:
    world, sparse = meshes(ep)
    parallelize_experts(net, sparse["ep"])
    for block in net.blocks:
        shard(block, mesh=world, expert_mesh=sparse["efsdp"], **options)
    fully_shard(net, mesh=world, **options)
    return net


def batch(rank: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ragged, and skewed so that experts must visit."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    pull = torch.randn(DIM, generator=torch.Generator().manual_seed(9))
    return (torch.randn(5 + 2 * rank, DIM, generator=generator) + 2.0 * pull).to(dtype)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = net(x)
    return (y - torch.sin(x)).square().mean()


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    return {name: full(value).clone() for name, value in net.state_dict().items()}


def layers_of(net: Net) -> list[MoE]:
    return [block.moe for block in net.blocks]  # type: ignore[misc]
