"""Experts of a Hugging Face transformers model, spread over ranks.

model = AutoModelForCausalLM.from_pretrained(...)
parallelize_experts(model, group, assigner=LeastLoaded(headroom=1.05))
"""

from moe.integrations.huggingface.layer import HostMoE, find_blocks, parallelize_experts

__all__ = ["HostMoE", "find_blocks", "parallelize_experts"]
