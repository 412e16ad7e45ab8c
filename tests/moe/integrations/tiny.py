"""Small models of every family, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moe.integrations.huggingface import HostMoE

BASE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
ROPE_SPLIT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 6, "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, **ROPE_SPLIT,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 8, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {"num_local_experts": 6, "head_dim": 8},
    "glm4_moe": {**DEEPSEEK, "head_dim": 8, "n_group": 1},
    "minimax_m2": {"num_local_experts": 6, "head_dim": 8, "rotary_dim": 8},
    "granitemoe": {"num_local_experts": 6},
    "phimoe": {"num_local_experts": 6},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 8, "moe_num_shared_experts": 1},
    "jamba": {
        "num_experts": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0,
        "use_mamba_kernels": False, "mamba_d_state": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "attention", "moe"], "num_hidden_layers": 3, "n_routed_experts": 6, "head_dim": 8,
        "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8, "n_group": 1, "topk_group": 1,
        "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 8,
    },
}  # fmt: skip
SUMS_IN_FP32 = {"nemotron_h"}  # over the experts of a token, whatever the model's type
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {"num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size_mlp": 8, "head_dim": 8},
}


def make(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A model of the family, alike on every rank."""
    config = CONFIG_MAPPING[family](**{**BASE, **(FAMILIES | UNSUPPORTED)[family], **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if parameter.is_floating_point() and (parameter.ndim >= 2 or "bias" in name):
                parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def prompt(seed: int, batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, HostMoE)]


def host_name(name: str) -> str:
    """A parameter's name before its experts were spread."""
    return name.replace(".experts.experts.", ".experts.")


def checkpointed(model: Any, *, use_reentrant: bool) -> None:
    """Activation checkpointing, under the name that this version of transformers has for it."""
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
