"""Tensors that are shards of a DeviceMesh: what this rank holds of them, and sums over the ranks that hold the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe.comm.group import Group, Peers, max_over, sum_over


def is_shard(tensor: object) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor)


def here(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, differentiable; of a plain one, all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shard(stack: Tensor, mesh: DeviceMesh) -> Tensor:
    """The stacks of all ranks of a one-dimensional mesh as one DTensor, rank after rank. All must be of one length."""
    return DTensor.from_local(stack, mesh, [Shard(0)], run_check=False)


def put(line: Tensor, stack: Tensor, slot: int, slots: int) -> None:
    """stack[slot] = line, or the part of it that is held here. A DTensor's last axis shares out the experts, `slots` of
    them to a rank; the others are FSDP's, which may have sharded those slots, or the insides of every line."""
    if isinstance(stack, DTensor):
        for axis in _axes(stack):
            ranks, rank = stack.device_mesh.size(axis), stack.device_mesh.get_local_rank(axis)
            dim = getattr(stack.placements[axis], "dim", 0)
            if axis == stack.device_mesh.ndim - 1:
                continue
            if dim > 0:
                line = line.chunk(ranks, dim - 1)[rank]
            elif rank != slot * ranks // slots:
                return
            else:
                slot -= rank * (slots // ranks)
        stack = stack.to_local()
    stack[slot].copy_(line)


def mesh_of(group: Group, device: torch.device) -> DeviceMesh:
    """A mesh as it is; the mesh of a process group."""
    if isinstance(group, DeviceMesh):
        return group
    if (known := Peers.of(group).group) is None:
        raise ValueError("a DTensor needs a mesh or a process group; got None")
    return DeviceMesh.from_group(known, device.type)


def shard_powers(pairs: Sequence[tuple[Tensor, Tensor | None]], norm_type: float) -> Tensor | None:
    """sum |g| ** p over the whole of every gradient, each element once, in float64; for p = inf the largest |g|.

    pairs: weights that are shards, and their gradients. None if there are none. Every rank of their meshes must call.
    """
    by_mesh: dict[Any, list[tuple[DTensor, Tensor | None]]] = {}
    for weight, grad in pairs:
        assert isinstance(weight, DTensor)
        by_mesh.setdefault((weight.device_mesh, _axes(weight)), []).append((weight, grad))
    totals: list[Tensor] = []
    for (mesh, axes), some in by_mesh.items():
        power = torch.stack([_power(weight, grad, norm_type) for weight, grad in some])
        power = power.sum() if norm_type != torch.inf else power.max()
        power = join(power, [Peers.of(mesh.get_group(axis)) for axis in axes], norm_type)
        totals.append(power)
    if not totals:
        return None
    return torch.stack(totals).max() if norm_type == torch.inf else torch.stack(totals).sum()


def join(part: Tensor, groups: Sequence[Peers], norm_type: float) -> Tensor:
    """Powers of several ranks as one: added, for p = inf the largest, and a NaN wherever any has one."""
    if norm_type != torch.inf:
        for peers in groups:
            sum_over([part], peers)
        return part
    nans = part.isnan().to(part.dtype)  # a backend's maximum may pass over a NaN
    for peers in groups:
        sum_over([nans], peers)
        max_over([part], peers)
    return part.where(nans == 0, torch.nan)


def _axes(weight: DTensor) -> tuple[int, ...]:
    """The mesh's axes over which it is sharded; over the others it is the same. A strided shard denies is_shard()."""
    return tuple(axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate())


def _power(weight: DTensor, grad: Tensor | None, norm_type: float) -> Tensor:
    local = weight.to_local().detach()
    zero = torch.zeros((), dtype=torch.float64, device=local.device)
    if grad is None:
        return zero
    if not isinstance(grad, DTensor) or grad.placements != weight.placements:
        where = grad.placements if isinstance(grad, DTensor) else "no DTensor"
        raise ValueError(f"a weight is {weight.placements}, its gradient {where}; clip after the gradients are reduced")
    norm = torch.linalg.vector_norm(grad.to_local(), norm_type, dtype=torch.float64) if local.numel() else zero
    return norm if norm_type == torch.inf else norm**norm_type
