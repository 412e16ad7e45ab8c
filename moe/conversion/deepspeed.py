"""DeepSpeed: a file for each expert of each layer, by its id in the whole layer, and one for all else.

Checked against deepspeed 0.19.8. The experts are modules of the user's, so what their weights are called is told, or
recognised among the usual names. layer_<n>: the n-th MoE layer of the model, whatever number its name has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.conversion.entries import Entry, apart, joined, single
from moe.conversion.layouts import IF_ANY, OWN_NAMES, Specs
from moe.conversion.mapped import Kept, blank, create_torch, map_torch

LATEST, MAIN, TAG = "latest", "mp_rank_00_model_states.pt", "converted"
EXPERTS = "deepspeed_moe.experts.deepspeed_experts.{expert}"
NAMED = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
NUMBER = re.compile(r"(?:^|\.)deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")
STYLES: dict[str, tuple[Entry, ...]] = {
    "evenmoe": joined(EXPERTS, "up", "down", weight="", bias="_bias"),
    "w1-w3-w2": apart(EXPERTS, "w1", "w3", "w2"),
    "proj": apart(EXPERTS, "gate_proj", "up_proj", "down_proj"),
    "fc": joined(EXPERTS, "fc1", "fc2"),
    "linear": joined(EXPERTS, "linear_fc1", "linear_fc2"),
    "4h": joined(EXPERTS, "dense_h_to_4h", "dense_4h_to_h"),
}


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """style: what the experts call their weights, a key of STYLES, or names such as "gate=a,up=b,down=c"; without a
    gate's name, a matrix twice as wide as down is the gate over up. trust: run what the pickles ask for."""

    style: str = "proj"
    template: str = ""
    prices: str = IF_ANY
    trust: bool = False
    ranks: int = 1

    def __post_init__(self) -> None:
        _ = self.entries

    @property
    def name(self) -> str:
        return f"DeepSpeed {self.style}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (
            *(STYLES[self.style] if self.style in STYLES else _named(self.style)),
            single("router", "deepspeed_moe.gate.wg.weight"),
            *OWN_NAMES,
        )

    def load(self, folder: Path) -> tuple[list[dict[str, Kept]], list[str]]:
        if (folder / LATEST).exists():
            folder = folder / (folder / LATEST).read_text().strip()
        if not (folder / MAIN).exists():
            raise ValueError(f"{folder}: has no {MAIN}; expected a checkpoint of DeepSpeed, of one model-parallel rank")
        if (folder / "mp_rank_01_model_states.pt").exists():
            raise ValueError(f"{folder}: is in slices of tensor parallelism; expected {MAIN} alone")
        main = map_torch(folder / MAIN, trust=self.trust)
        kept = {key: Kept.of(value) for key, value in main["module"].items() if isinstance(value, Tensor)}
        faults: list[str] = []
        for path in sorted(folder.glob("layer_*_expert_*_mp_rank_00_model_states.pt")):
            named = NAMED.fullmatch(path.name)
            for key, value in map_torch(path, trust=self.trust).items():
                number = NUMBER.search(key)
                if named and number and number[1] != named[2]:
                    faults.append(f"{path.name} holds {key}: expert {number[1]}, its name says {named[2]}")
                if key in kept:
                    faults.append(f"{key} is doubled: it is in {path.name} and in another file")
                kept[key] = Kept.of(value)
        return [kept], faults

    def create(self, folder: Path, ranks: Sequence[Specs], layers: Sequence[str]) -> list[dict[str, Tensor]]:
        (folder / LATEST).write_text(TAG)
        folder = folder / TAG
        folder.mkdir()
        files: dict[str, dict[str, Any]] = {}
        experts = [0] * len(layers)
        main: dict[str, Any] = {}
        place = {layer: number for number, layer in enumerate(layers)}
        for key, spec in ranks[0].items():
            if (number := NUMBER.search(key)) is None:
                main[key] = spec
                continue
            layer = place[key[: number.start()]]
            experts[layer] = max(experts[layer], int(number[1]) + 1)
            files.setdefault(f"layer_{layer}_expert_{number[1]}_mp_rank_00_model_states.pt", {})[key] = spec
        tensors: dict[str, Tensor] = {}
        for name, specs in files.items():
            tensors |= create_torch(folder / name, blank(specs))
        content = {"module": blank(main), "num_experts": experts, "dp_world_size": 1, "mp_world_size": 1, **_FRESH}
        return [tensors | create_torch(folder / MAIN, content)["module"]]


_FRESH: dict[str, Any] = {
    "buffer_names": [], "optimizer": None, "lr_scheduler": None, "data_sampler": None, "random_ltd": None,
    "sparse_tensor_module_names": [], "skipped_steps": 0, "global_steps": 0, "global_samples": 0, "ds_config": {},
    "ds_version": "0.19.8",
}  # fmt: skip


def _named(text: str) -> tuple[Entry, ...]:
    """gate=wi_0.weight,up=wi_1.weight,down=wo.weight"""
    names = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    known = {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"}
    if not {"up", "down"} <= names.keys() <= known:
        raise ValueError(
            f"style {text!r} is not one of {', '.join(STYLES)}, nor names such as "
            f"gate=wi_0.weight,up=wi_1.weight,down=wo.weight"
        )
    alone = [single(part, f"{EXPERTS}.{name}") for part, name in names.items()]
    return tuple(
        replace(entry, parts=(entry.parts[0].replace("up", "gate"), entry.parts[0]))
        if entry.parts[0].startswith("up") and "gate" not in names
        else entry
        for entry in alone
    )
