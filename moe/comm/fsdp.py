"""FSDP2 with two meshes: experts over the ranks that hold the same ones, everything else over all ranks.

Of FSDP, only what `fully_shard` needs to put some parameters on a mesh of their own; torch keeps it in private modules.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle

Mesh: TypeAlias = DeviceMesh


class Style(ParallelStyle):
    """One entry of a plan for torch's parallelize_module."""

    @abstractmethod
    def parallelize(self, module: nn.Module, mesh: DeviceMesh) -> None: ...

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.parallelize(module, device_mesh)
        return module


def shard_on_two_meshes(
    module: nn.Module,
    experts: Collection[nn.Parameter],
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    options: dict[str, Any],
) -> None:
    """fully_shard(module, mesh=mesh, **options), but for the experts, which go on expert_mesh.

    Their gradient is that of every token of every rank, so it is divided by the size of `mesh`, as the others are.
    FSDP would divide by the size of the mesh they are on: so many times too large would they be as ranks share experts.
    """
    if expert_mesh.size() == mesh.size():  # every rank has every expert: two meshes of the same ranks are one to FSDP
        mesh = expert_mesh
    expert_info = _info(expert_mesh)
    mesh_info = expert_info if mesh is expert_mesh else _info(mesh)
    _refuse_double_division(experts, expert_info.shard_mesh_size, options.get("mp_policy", MixedPrecisionPolicy()))
    of_experts = {id(weight) for weight in experts}
    axis = {id(weight): _axis(weight, expert_info.shard_mesh_size) for weight in experts}

    def place(weight: nn.Parameter) -> ShardPlacementResult:
        if id(weight) in of_experts:
            return ShardPlacementResult(placement=Shard(axis[id(weight)]), mesh_info=expert_info)
        return ShardPlacementResult(placement=None, mesh_info=mesh_info)

    fully_shard(module, mesh=mesh, shard_placement_fn=place, **options)
    assert isinstance(module, FSDPModule)
    for group in module._get_fsdp_state()._fsdp_param_groups:
        group.gradient_divide_factor = float(mesh.size())
        # Sums, then a division: gloo has no reduction that multiplies. Where nobody shards, torch divides without it.
        group.force_sum_reduction_for_comms = _shards(group.mesh_info)


def _refuse_double_division(experts: Collection[nn.Parameter], ranks: int, policy: MixedPrecisionPolicy) -> None:
    """A factor that FSDP applies before and after the reduction for fear of an overflow, it applies once more where
    there is one rank and nothing to reduce (torch 2.13)."""
    for weight in experts:
        dtype = policy.reduce_dtype or policy.param_dtype or weight.dtype
        if ranks == 1 and dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"expert gradients in {dtype} on an expert mesh of 1 shard: torch would divide them twice; "
                f"use mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), or a larger expert mesh"
            )


def _axis(weight: nn.Parameter, ranks: int) -> int:
    """The dim along which FSDP shards an expert weight: the first that the ranks can share evenly."""
    assert isinstance(weight, DTensor)
    shape = weight.to_local().shape
    for dim, length in enumerate(shape):
        if length % ranks == 0:
            return dim
    raise ValueError(
        f"an expert weight of {list(shape)} on each rank cannot be shared evenly by {ranks} ranks along any dim, and "
        f"torch has no uneven shards on two meshes; choose a size of the expert mesh that divides one of them"
    )


def _shards(info: object) -> bool:
    assert isinstance(info, FSDPMeshInfo)
    return info.shard_mesh_size > 1


def _info(mesh: DeviceMesh) -> FSDPMeshInfo:
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    if mesh.ndim == 2:
        return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    raise ValueError(f"FSDP shards over a mesh of one dimension, or replicates and shards over two; got {mesh}")
