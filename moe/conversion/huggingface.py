"""Hugging Face: the tensors of a family of models, as `save_pretrained` writes them.

A table, as transformers need not be installed to convert a file; tests hold it against what transformers' own
conversion makes of the same file. Only gpt-oss interleaves gate and up, and nothing in a file says so: a family that is
not here is refused, not guessed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moe.conversion.entries import Entry, apart, single
from moe.conversion.layouts import ALWAYS, Specs, create_shards, load_safetensors
from moe.conversion.mapped import Kept

CONFIG = "config.json"
GATE, ROUTER = single("router", "gate.weight"), single("router", "router.weight")
CORRECTION = single("price", "gate.e_score_correction_bias", negated=True)
BY_NUMBER = apart("experts.{expert}", "w1", "w3", "w2")
BY_NAME = apart("experts.{expert}", "gate_proj", "up_proj", "down_proj")
SHARED = apart("shared_experts", "gate_proj", "up_proj", "down_proj", shared=True)
ONE_SHARED = apart("shared_expert", "gate_proj", "up_proj", "down_proj", shared=True)
SPARSE, MLP = "model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.mlp"


def _stacks(*, interleaved: bool) -> tuple[Entry, ...]:
    both, down = ("gate", "up"), ("down",)
    return (
        Entry(name="experts.gate_up_proj", parts=both, interleaved=interleaved, transposed=True),
        Entry(name="experts.down_proj", parts=down, transposed=True),
        Entry(name="experts.gate_up_proj_bias", parts=("gate_bias", "up_bias"), interleaved=interleaved),
        Entry(name="experts.down_proj_bias", parts=("down_bias",)),
    )


def _granite() -> tuple[Entry, ...]:
    return (
        Entry(name="input_linear.weight", parts=("gate", "up")),
        Entry(name="output_linear.weight", parts=("down",)),
        single("router", "router.layer.weight"),
    )


# family -> (the name of a layer's module, its tensors)
FAMILIES: dict[str, tuple[str, tuple[Entry, ...]]] = {
    "mixtral": (SPARSE, (*BY_NUMBER, GATE)),
    "phimoe": (SPARSE, (*BY_NUMBER, GATE)),
    "minimax_m2": (SPARSE, (*BY_NUMBER, GATE, single("price", "e_score_correction_bias", negated=True))),
    "qwen2_moe": (MLP, (*BY_NAME, GATE, *ONE_SHARED, single("shared_switch", "shared_expert_gate.weight"))),
    "qwen3_moe": (MLP, (*BY_NAME, GATE)),
    "olmoe": (MLP, (*BY_NAME, GATE)),
    "deepseek_v2": (MLP, (*BY_NAME, GATE, *SHARED)),
    "deepseek_v3": (MLP, (*BY_NAME, GATE, *SHARED, CORRECTION)),
    "glm4_moe": (MLP, (*BY_NAME, GATE, *SHARED, CORRECTION)),
    "ernie4_5_moe": (
        MLP,
        (*BY_NAME, GATE, *SHARED, single("price", "moe_statics.e_score_correction_bias", negated=True, row=True)),
    ),
    "jamba": ("model.layers.{layer}.feed_forward", (*BY_NAME, ROUTER)),
    "nemotron_h": ("backbone.layers.{layer}.mixer", (*BY_NAME, GATE, *SHARED, CORRECTION)),
    "gpt_oss": (MLP, (*_stacks(interleaved=True), ROUTER, single("router_bias", "router.bias"))),
    "llama4_text": (
        "model.layers.{layer}.feed_forward",
        (*_stacks(interleaved=False), ROUTER, *ONE_SHARED),
    ),
    "granitemoe": (SPARSE, _granite()),
}


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """family: a key of FAMILIES. config: a config.json to put beside the weights that are written, "" for none."""

    family: str
    template: str = ""
    config: str = ""
    shard_bytes: int = 4 * 2**30
    ranks: int = 1
    prices: str = ALWAYS

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not one of {', '.join(FAMILIES)}")
        if not self.template:
            object.__setattr__(self, "template", FAMILIES[self.family][0])

    @property
    def name(self) -> str:
        return f"Hugging Face {self.family}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return FAMILIES[self.family][1]

    def load(self, folder: Path) -> tuple[list[dict[str, Kept]], list[str]]:
        return load_safetensors(folder)

    def create(self, folder: Path, ranks: Sequence[Specs], layers: Sequence[str]) -> list[dict[str, Tensor]]:
        if self.config:
            shutil.copyfile(self.config, folder / CONFIG)
        return [create_shards(folder, ranks[0], self.shard_bytes)]


def family_of(folder: Path) -> str | None:
    """What the config in a folder, or the config itself, says of its family, if it is one of ours."""
    path = folder / CONFIG if folder.is_dir() else folder
    try:
        family = json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return family if family in FAMILIES else None
