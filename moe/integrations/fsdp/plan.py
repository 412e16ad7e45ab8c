"""ExpertParallel: a layer's experts as DTensors, Shard(0) over a mesh, so that rank r of R has the r-th part of them.

The global tensor has the experts in the order of their numbers, whatever the size of the mesh. That is why other
parts of torch can save and load it, and why experts cannot live just anywhere.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from moe.comm import Group, Peers, as_shard, is_shard, mesh_of
from moe.comm.fsdp import Mesh, Style
from moe.layer import MoE
from placement import Placement


class ExpertParallel(Style):
    """For torch's parallelize_module: parallelize_module(model, mesh["ep"], {"blocks.*.moe": ExpertParallel()})."""

    def parallelize(self, module: nn.Module, mesh: Mesh) -> None:
        if not isinstance(module, MoE):
            raise ValueError(
                f"ExpertParallel is for evenmoe's MoE layers; the plan gives it to a {type(module).__name__}"
            )
        _spread(module, mesh)


def parallelize_experts(model: nn.Module, mesh: Group) -> nn.Module:
    """Every MoE layer of a model, in place, over a one-dimensional mesh or a process group. -> the model

    A layer is made either alone, group=None, with all experts, or on this very mesh with placement=in_order(...). Then
    come fully_shard, the optimiser, and whatever else holds on to parameters: they are new ones.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer of evenmoe's")
    for name, layer in layers.items():
        try:
            _spread(layer, mesh)
        except ValueError as error:
            raise ValueError(f"{name or 'the layer'}: {error}") from None
    return model


def in_order(num_experts: int, ranks: int) -> Placement:
    """The first experts on the first rank, the next on the second: the only placement that a DTensor can hold."""
    if num_experts % ranks:
        raise ValueError(
            f"{num_experts} experts on {ranks} ranks: shards of a DTensor must be even, or torch takes it for another "
            f"tensor (pytorch#160533); use a number of ranks that divides {num_experts}, or plain parameters, "
            f"MoE(config, group), which take any"
        )
    return Placement(expert_RS=np.arange(num_experts).reshape(ranks, -1))


def _spread(layer: MoE, group: Group) -> None:
    weights = dict(layer.experts.named_parameters())
    if any(is_shard(weight) for weight in weights.values()):
        raise ValueError("its experts are DTensors already; parallelize a model once, before fully_shard")
    peers = Peers.of(group)
    placement = in_order(layer.config.num_experts, peers.size)
    ids = placement.experts_of(peers.rank).tolist()
    alone = layer.peers.group is None
    if not alone and layer.experts.expert_ids != tuple(ids):
        raise ValueError(
            f"rank {peers.rank} holds experts {list(layer.experts.expert_ids)}; a DTensor over {peers.size} ranks "
            f"wants {ids}. Make the layer with placement=in_order({layer.config.num_experts}, {peers.size}), or alone"
        )
    mesh = mesh_of(group, next(iter(weights.values())).device)
    for name, weight in weights.items():
        own: Tensor = weight.detach()
        if alone:
            own = own[ids[0] : ids[0] + len(ids)].clone()  # so that the rest can be freed
        shard = nn.Parameter(as_shard(own, mesh), requires_grad=weight.requires_grad)
        layer.experts.register_parameter(name, shard)
    layer.peers, layer.placement, layer.experts.expert_ids = peers, placement, tuple(ids)
