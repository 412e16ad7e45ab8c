"""Megatron-Core: the files of its `torch` format, one for each expert-parallel rank, experts numbered from 0 in each.

Checked against megatron-core 0.16.1. linear_fc1 is the gate over up. What is not of an expert is in every file. Its
distributed format (`torch_dist`), where a tensor has all experts and may have all layers, is read and not written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.comm import Shelf
from moe.conversion.entries import Entry, joined, single
from moe.conversion.layouts import IF_ANY, Specs
from moe.conversion.mapped import Kept, blank, create_torch, map_torch

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
LINEAR = re.compile(r"(.*\.linear_\w+)\.weight\d*")
OPTIMIZER = ("optimizer.", "chained_")
STACK = re.compile(r"\.experts\.experts\.(?!\d)")
OF_ALL_LAYERS = re.compile(r"(.*\blayers)\.((?:mlp\.experts|mlp\.router|mlp\.shared_experts)\..*)")
STYLES: dict[str, tuple[Entry, ...]] = {
    "sequential": joined("experts.local_experts.{expert}", "linear_fc1", "linear_fc2"),
    "te-grouped": joined("experts", "linear_fc1", "linear_fc2", weight=".weight{expert}", bias=".bias{expert}"),
    "distributed": (
        *joined("experts.experts.{expert}", "linear_fc1", "linear_fc2"),
        # With singleton_local_shards: gate and up apart.
        *(
            single(f"{kind}{part}{bias}", f"{prefix}.linear_fc1.{'bias' if bias else 'weight'}_{end}")
            for kind, prefix in (("", "experts.experts.{expert}"), ("shared_", "shared_experts"))
            for part, end in (("gate", "w"), ("up", "v"))
            for bias in ("", "_bias")
        ),
    ),
    "grouped": (
        Entry(name="experts.weight1", parts=("gate", "up"), transposed=True, flat="wide"),
        Entry(name="experts.weight2", parts=("down",), transposed=True, flat="tall"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """ranks: expert-parallel ranks, a file each. style: sequential (SequentialMLP), te-grouped (TEGroupedMLP), grouped
    (GroupedMLP, transposed), distributed (reading only). trust: run what the pickles ask for."""

    ranks: int = 1
    style: str = "sequential"
    template: str = "decoder.layers.{layer}.mlp"
    prices: str = IF_ANY
    trust: bool = False

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r} is not one of {', '.join(STYLES)}")
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks}; expected 1 or more")

    @property
    def name(self) -> str:
        return f"Megatron-Core {self.style}, {self.ranks} expert-parallel rank{'s' * (self.ranks > 1)}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (
            *STYLES[self.style],
            single("router", "router.weight"),
            single("router_bias", "router.bias"),
            single("price", "router.expert_bias", negated=True),
            *joined("shared_experts", "linear_fc1", "linear_fc2", shared=True),
            single("shared_switch", "shared_experts.gate_weight"),
        )

    def load(self, folder: Path) -> tuple[list[dict[str, Kept]], list[str]]:
        folder = _last(folder)
        if (folder / ".metadata").exists():
            return [_distributed(folder)], []
        ranks = []
        for path in _files(folder):
            content = map_torch(path, trust=self.trust)
            model = content.get("model") if isinstance(content, dict) else None
            if not isinstance(model, dict):
                more = " (virtual pipeline stages)" if isinstance(content, dict) and "model0" in content else ""
                raise ValueError(f"{path}: has no 'model'{more}; expected a checkpoint of Megatron's torch format")
            _refuse_slices(path, content.get("args"))
            ranks.append({key: Kept.of(value) for key, value in model.items() if isinstance(value, Tensor)})
        return ranks, []

    def create(self, folder: Path, ranks: Sequence[Specs], layers: Sequence[str]) -> list[dict[str, Tensor]]:
        if self.style == "distributed":
            raise ValueError(
                "Megatron's distributed format is read, not written; use style sequential, te-grouped or grouped"
            )
        (folder / TRACKER).write_text("release")
        tensors = []
        for rank, specs in enumerate(ranks):
            name = "mp_rank_00" if len(ranks) == 1 else f"mp_rank_00_{rank:03}"
            path = folder / "release" / name / FILE
            path.parent.mkdir(parents=True)
            # Megatron's linear layers say that they have a state besides their weights, and miss it where it is not.
            states = {LINEAR.sub(r"\1._extra_state", key): None for key in specs if LINEAR.fullmatch(key)}
            content = {"model": blank(specs) | states, "checkpoint_version": 3.0, "iteration": 0}
            model = create_torch(path, content)["model"]
            tensors.append({key: model[key] for key in specs})
        return tensors


def _last(folder: Path) -> Path:
    """The folder of the checkpoint that was written last."""
    if not (folder / TRACKER).exists():
        return folder
    last = (folder / TRACKER).read_text().strip()
    return folder / (f"iter_{int(last):07}" if last.isdigit() else last)


def _distributed(folder: Path) -> dict[str, Kept]:
    """The model's tensors, those of MoE layers as if each layer and each expert had its own."""
    shelf = Shelf(folder)
    kept: dict[str, Kept] = {}
    for name, info in shelf.tensors.items():
        if name.startswith(OPTIMIZER):
            continue
        lines: list[tuple[str, tuple[int, ...]]] = [(name, ())]
        if (of_all := OF_ALL_LAYERS.fullmatch(name)) is not None:
            lines = [(f"{of_all[1]}.{layer}.{of_all[2]}", (layer,)) for layer in range(info.shape[0])]
        if STACK.search(name):
            lines = [
                (STACK.sub(f".experts.experts.{expert}.", key), (*place, expert))
                for key, place in lines
                for expert in range(info.shape[len(place)])
            ]
        for key, place in lines:
            kept[key] = Kept(info.shape[len(place) :], info.dtype, partial(shelf.read, name, place))
    return kept


def _files(folder: Path) -> list[Path]:
    """The file of each expert-parallel rank."""
    found = {path.parent.name: path for path in folder.glob(f"mp_rank_*/{FILE}")}
    if not found:
        raise ValueError(f"{folder}: has no mp_rank_*/{FILE}; expected a checkpoint of Megatron's torch format")
    for name in found:
        parts = re.fullmatch(r"mp_rank_(\d+)(_\d{3})?(_\d{3})?", name)
        if parts is None or int(parts[1]) or parts[3]:
            raise ValueError(
                f"{folder}: {name} is a slice of tensor or pipeline parallelism; expected mp_rank_00, or "
                f"mp_rank_00_000 and on, one for each expert-parallel rank"
            )
    names = sorted(found)
    if len(names) > 1 and names != [f"mp_rank_00_{rank:03}" for rank in range(len(names))]:
        raise ValueError(f"{folder}: has {', '.join(names)}; expected mp_rank_00_000 and on, none missing")
    return [found[name] for name in names]


def _refuse_slices(path: Path, args: Any) -> None:
    for name in ("tensor_model_parallel_size", "expert_tensor_parallel_size", "pipeline_model_parallel_size"):
        if (size := getattr(args, name, None) or 1) > 1:
            raise ValueError(f"{path}: was saved with {name}={size}; expected 1: merge the slices first")
