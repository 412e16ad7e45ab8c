"""Checkpoints from one layout to another, expert by expert: evenmoe, Hugging Face, Megatron-Core, DeepSpeed.

Files alone: none of the hosts need be installed. `moe-convert` is this package's command.
"""

from moe.conversion.compare import verify
from moe.conversion.convert import Converted, convert
from moe.conversion.deepspeed import DeepSpeed
from moe.conversion.detect import detect
from moe.conversion.huggingface import HuggingFace
from moe.conversion.layouts import Layout, Ours
from moe.conversion.megatron import Megatron

__all__ = ["Converted", "DeepSpeed", "HuggingFace", "Layout", "Megatron", "Ours", "convert", "detect", "verify"]
