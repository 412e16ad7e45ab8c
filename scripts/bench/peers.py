"""Others' experts of the same weights, on one process: transformers' and Megatron-Core's.

Each starts from the chosen experts and their weights, and ends with y. What is not installed, or fails while it is
made, is a reason in place of a peer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import Experts
from scripts.bench.clock import reason

FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every peer is given. weight_TK: in fp32, as our router has it."""

    experts: Experts
    x_TD: Tensor
    expert_TK: Tensor
    weight_TK: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """-> experts, dim, hidden"""
        return self.experts.down.shape[0], self.experts.down.shape[1], self.experts.down.shape[2]


@dataclass(frozen=True)
class Peer:
    """run() -> y. module: whose gradients are let go before each run."""

    run: Callable[[], Tensor]
    module: nn.Module


def peers_of(case: Case) -> tuple[dict[str, Peer], dict[str, str]]:
    """-> by name the peers, and why others are not among them"""
    found: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    for name, make in MAKERS.items():
        try:
            found[name] = make(case)
        except FAILURES as error:
            absent[name] = reason(error)
    return found, absent


def hugging_face(case: Case, implementation: str) -> Peer:
    """transformers' Qwen3 experts."""
    num_experts, dim, hidden = case.sizes
    qwen = "transformers.models.qwen3_moe."
    config = importlib.import_module(f"{qwen}configuration_qwen3_moe").Qwen3MoeConfig(
        num_experts=num_experts,
        hidden_size=dim,
        moe_intermediate_size=hidden,
        num_experts_per_tok=case.expert_TK.shape[1],
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = importlib.import_module(f"{qwen}modeling_qwen3_moe").Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = case.experts.up, case.experts.down

    def run() -> Tensor:
        y_TD: Tensor = module(case.x_TD, case.expert_TK, case.weight_TK.to(case.x_TD.dtype))
        return y_TD

    return Peer(run, module)


def megatron(case: Case) -> Peer:
    """Megatron-Core's SequentialMLP between its own permute and unpermute. Its weights are views of ours, its gradients
    its own. The router's table [T, E] is made before the clock starts, as Megatron's router makes it."""
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    module = _sequential(case)
    routing_TE = torch.zeros(len(case.x_TD), case.sizes[0], dtype=torch.bool).scatter_(1, case.expert_TK, True)
    rows_E = routing_TE.sum(dim=0)

    def run() -> Tensor:
        prob_TE = torch.zeros(routing_TE.shape).scatter(1, case.expert_TK, case.weight_TK)
        row_ND, prob_N, order_N = utils.permute(case.x_TD, routing_TE, probs=prob_TE)
        out_ND, _ = module(row_ND, rows_E, prob_N)
        y_TD: Tensor = utils.unpermute(out_ND, order_N, case.x_TD.shape, routing_map=routing_TE)
        return y_TD

    return Peer(run, module)


def _sequential(case: Case) -> nn.Module:
    num_experts, dim, hidden = case.sizes
    config = importlib.import_module("megatron.core.transformer.transformer_config").TransformerConfig(
        num_layers=1,
        hidden_size=dim,
        num_attention_heads=1,
        ffn_hidden_size=hidden,
        moe_ffn_hidden_size=hidden,
        num_moe_experts=num_experts,
        moe_router_topk=case.expert_TK.shape[1],
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        params_dtype=case.x_TD.dtype,
        bf16=case.x_TD.dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )
    specs = importlib.import_module("megatron.core.models.gpt.moe_module_specs")
    spec = specs.get_moe_module_spec(use_te=False, num_experts=num_experts).submodules.experts
    groups = importlib.import_module("megatron.core.process_groups_config").ProcessGroupCollection
    alone = _alone()
    module: nn.Module = spec.module(
        num_experts, config, spec.submodules, groups(ep=alone, expt_tp=alone, expt_dp=alone)
    )
    wanted, mlps = case.experts.up.requires_grad, cast(Any, module).local_experts
    for mlp, up, down in zip(mlps, case.experts.up.detach(), case.experts.down.detach(), strict=True):
        mlp.linear_fc1.weight = nn.Parameter(up, requires_grad=wanted)
        mlp.linear_fc2.weight = nn.Parameter(down, requires_grad=wanted)
    return module


def _alone() -> Any:
    """Megatron asks a group for its size. One of this process, which speaks to nobody."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return dist.group.WORLD


MAKERS: dict[str, Callable[[Case], Peer]] = {
    "HF eager": lambda case: hugging_face(case, "eager"),
    "HF grouped": lambda case: hugging_face(case, "grouped_mm"),
    "Megatron": megatron,
}
