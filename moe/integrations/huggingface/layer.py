"""parallelize_experts: the experts of a transformers model, spread over a group. Its router stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe.batch import Batch
from moe.census import Pool
from moe.comm import Group, Peers
from moe.config import MoEConfig
from moe.integrations.huggingface.experts import Host, HostExperts, is_fused, problem_with, sizes_of
from moe.integrations.huggingface.router import HostRouter
from moe.layer import MoE
from placement import Placement, Plan
from routing import Assigner, AtHome, Balancer, Choice, Rows, Unpriced

SUPPORTED = (
    "evenmoe spreads the experts of every class that transformers marks with use_experts_implementation "
    "(Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and V3, GLM-4-MoE, gpt-oss and others)"
)


class HostMoE(MoE):
    """In the place of a block's experts: (tokens [T, dim], experts [T, K], weights [T, K]) -> [T, dim].

    An evenmoe layer in every other respect: observers, Recorder, clip_grad_norm, DDP and settle_prices know it.
    """

    def __init__(
        self, host: nn.Module, block: nn.Module, config: MoEConfig, group: Group, placement: Placement | None
    ) -> None:
        weight = host.get_parameter("down_proj")
        device = torch.device("cpu") if weight.is_meta else weight.device
        with torch.random.fork_rng(devices=[]):  # a model that is patched draws the numbers it would have drawn
            super().__init__(config, group, placement, device="meta")
            self.router = HostRouter(config.num_experts, _width(config), balancer=config.balancer, device=device)
        self.experts = self._adopt(host, config)
        self.pool = Pool(config.num_experts, device)
        self.train(host.training)
        self._told: tuple[Tensor, Tensor] | None = None
        block.register_forward_pre_hook(self.router.hear)
        block.register_forward_hook(self.router.go_deaf, always_call=True)

    def _adopt(self, host: nn.Module, config: MoEConfig) -> HostExperts:
        return HostExperts(host, self.placement.experts_of(self.peers.rank).tolist(), config.compute)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._told = top_k_index, top_k_weights
        try:
            y_TD: Tensor = super().forward(hidden_states)
            return y_TD.to(hidden_states.dtype)
        finally:
            self._told = None

    def _route(self, batch: Batch, rows: Rows | None = None) -> Choice:
        assert self._told is not None
        assert isinstance(self.router, HostRouter)
        return self.router.told(*self._told, rows)


def parallelize_experts(
    model: nn.Module,
    group: Group = None,
    *,
    assigner: Assigner = AtHome(),
    balancer: Balancer | None = None,
    placement: Plan | Placement | None = None,
) -> nn.Module:
    """Spread the experts of every MoE block of a transformers model over a group, in place. -> the model

    Each rank keeps the experts that live on it and frees the others. Outputs and gradients are those of the model
    before, where the loss is the sum over the ranks. balancer: prices for the host's own choice; None leaves it alone.
    placement: a Plan with a line for each block, one Placement for them all, or None for round robin.
    """
    blocks = find_blocks(model)
    placements = _placements(placement, len(blocks))
    configs = [
        _config(name, block, host, layer, assigner, Unpriced() if balancer is None else balancer)
        for layer, (name, block, host) in enumerate(blocks)
    ]
    for (name, block, host), config, where in zip(blocks, configs, placements, strict=True):
        setattr(block, name.rpartition(".")[2], HostMoE(host, block, config, group, where))
    if Peers.of(group).size > 1 and hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return model


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name of its experts, block, experts) of every MoE block, or ValueError if there are none or one is beyond us."""
    modules = dict(model.named_modules())
    if spread := [name for name, module in modules.items() if isinstance(module, HostMoE)]:
        raise ValueError(f"the experts of this model are spread already ({spread[0]}); parallelize a model once")
    found = [(name, modules[name.rpartition(".")[0]], module) for name, module in modules.items() if is_fused(module)]
    for name, _, host in found:
        if (problem := problem_with(host)) is not None:
            raise ValueError(f"{name} ({type(host).__name__}) {problem}")
    if not found:
        like = sorted({type(m).__name__ for m in modules.values() if "expert" in type(m).__name__.lower()})
        seen = f"experts of another layout ({', '.join(like)})" if like else "no experts"
        raise ValueError(f"{type(model).__name__} has {seen}; {SUPPORTED}")
    return found


def _config(
    name: str, block: nn.Module, host: nn.Module, layer: int, assigner: Assigner, balancer: Balancer
) -> MoEConfig:
    num_experts, dim, hidden = sizes_of(host)
    return MoEConfig(
        dim=dim,
        hidden=hidden,
        num_experts=num_experts,
        top_k=_top_k(name, block),
        balancer=balancer,
        layer=layer,
        assigner=assigner,
        activation=Host(host).activation,
        bias=bool(host.has_bias),
    )


def _top_k(name: str, block: nn.Module) -> int:
    """How many experts a token takes: its block says, or its router."""
    for module in (block, *block.children()):
        if isinstance(top_k := getattr(module, "top_k", None), int):
            return top_k
    raise ValueError(f"neither {type(block).__name__} nor a module in it says its top_k, so {name} cannot be spread")


def _width(config: MoEConfig) -> int:
    assert isinstance(config.top_k, int)
    return config.top_k


def _placements(placement: Plan | Placement | None, blocks: int) -> tuple[Placement | None, ...]:
    if not isinstance(placement, Plan):
        return (placement,) * blocks
    if len(placement.placement_L) != blocks:
        raise ValueError(f"the plan has {len(placement.placement_L)} layers, the model {blocks} MoE blocks")
    return placement.placement_L


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "the experts of this model are spread over ranks; on every rank, call "
        "moe.integrations.huggingface.save_pretrained(model, folder)"
    )
