"""Experts of a Hugging Face transformers model, spread over ranks.

model = AutoModelForCausalLM.from_pretrained(...)
parallelize_experts(model, group, assigner=LeastLoaded(headroom=1.05))
"""

from moe.integrations.require import require

require("transformers", at_least="5.22.2", extra="hf")

from moe.integrations.huggingface.checkpoint import Tally, load_pretrained, save_pretrained  # noqa: E402
from moe.integrations.huggingface.door import door_layers, register_ep_implementation  # noqa: E402
from moe.integrations.huggingface.layer import HostMoE, find_blocks, parallelize_experts  # noqa: E402
from moe.integrations.huggingface.padding import leave_padding_out  # noqa: E402
from moe.integrations.huggingface.registered import register_experts_implementation  # noqa: E402

__all__ = [
    "HostMoE", "Tally", "door_layers", "find_blocks", "leave_padding_out", "load_pretrained", "parallelize_experts",
    "register_ep_implementation", "register_experts_implementation", "save_pretrained",
]  # fmt: skip
