"""shard: fully_shard for a module with MoE layers in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe.comm import is_shard
from moe.comm.fsdp import Mesh, shard_on_two_meshes
from moe.layer import MoE


def shard(module: nn.Module, *, mesh: Mesh, expert_mesh: Mesh, **options: Any) -> nn.Module:
    """As torch's fully_shard(module, mesh=mesh, **options), but the experts in it go on expert_mesh. -> the module

    Give it blocks, bottom up, as one does with fully_shard; not the layers' `experts`, which are no unit of their own.
    mesh: all ranks that see different tokens. expert_mesh: those of them that hold the same experts; with the experts'
    own mesh it makes up `mesh`, and both are slices of one. Two dimensions replicate, then shard, in either.
    """
    layers = [each for each in module.modules() if isinstance(each, MoE)]
    experts = [weight for layer in layers for weight in layer.experts.parameters()]
    if plain := [layer for layer in layers if not all(is_shard(weight) for weight in layer.experts.parameters())]:
        raise ValueError(
            f"the experts of {len(plain)} of {len(layers)} MoE layers are plain tensors, which FSDP would take for the "
            f"same on every rank; call parallelize_experts(model, ep_mesh) first"
        )
    for layer in layers:
        if layer.peers.size * expert_mesh.size() != mesh.size():
            raise ValueError(
                f"the mesh has {mesh.size()} ranks; {layer.peers.size} that share experts times {expert_mesh.size()} "
                f"that hold the same are {layer.peers.size * expert_mesh.size()}: give the mesh of all ranks, and the "
                f"expert mesh that is left of it"
            )
    shard_on_two_meshes(module, experts, mesh, expert_mesh, options)
    return module
