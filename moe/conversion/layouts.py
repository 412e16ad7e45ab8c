"""Layouts: what a host calls the tensors of an MoE layer, and in which files it keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe.comm import Shelf
from moe.conversion.entries import Entry, joined, single
from moe.conversion.mapped import Kept, Spec, create_safetensors, map_safetensors

INDEX = "model.safetensors.index.json"
ALWAYS, IF_ANY = "always", "if any"
Specs = Mapping[str, Spec]


class Layout(Protocol):
    """A value that knows how a host keeps a model.

    template: what a layer's module is called, by its number, {layer}; "" keeps the name it has. ranks: how many
    expert-parallel ranks have tensors of their own, each numbering its experts from 0. prices: whether a layer has them
    always, or only if one is not zero.
    """

    @property
    def name(self) -> str: ...
    @property
    def template(self) -> str: ...
    @property
    def ranks(self) -> int: ...
    @property
    def prices(self) -> str: ...
    @property
    def entries(self) -> tuple[Entry, ...]: ...

    def load(self, folder: Path) -> tuple[list[dict[str, Kept]], list[str]]:
        """-> (the tensors of each rank, what is wrong with the files)"""

    def create(self, folder: Path, ranks: Sequence[Specs], layers: Sequence[str]) -> list[dict[str, Tensor]]:
        """-> the tensors of each rank, memory of new files in the folder. layers: their names, in order."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """evenmoe's own: what `export_safetensors` writes and `import_safetensors` reads. It also reads a folder of
    `moe.checkpoint`, the model's part of it."""

    template: str = ""
    shard_bytes: int = 4 * 2**30
    ranks: int = 1
    prices: str = ALWAYS
    name: str = "evenmoe"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (
            *joined("experts.{expert}", "up", "down", weight="", bias="_bias"),
            *OWN_NAMES,
            single("router", "router.weight"),
            single("settled", "router.settled"),
        )

    def load(self, folder: Path) -> tuple[list[dict[str, Kept]], list[str]]:
        if not (folder / ".metadata").exists():
            return load_safetensors(folder)
        shelf = Shelf(folder)
        kept = {
            name.removeprefix("model."): Kept(info.shape, info.dtype, partial(shelf.read, name))
            for name, info in shelf.tensors.items()
            if name.startswith("model.")
        }
        return [kept], []

    def create(self, folder: Path, ranks: Sequence[Specs], layers: Sequence[str]) -> list[dict[str, Tensor]]:
        return [create_shards(folder, ranks[0], self.shard_bytes)]


# What a host has no place for goes by the names that our layer has, or would have.
OWN_NAMES = (
    *joined("shared", "up", "down", shared=True),
    single("price", "router.price_E"),
    single("router_bias", "router.bias"),
    single("shared_switch", "shared_switch.weight"),
)


def load_safetensors(folder: Path) -> tuple[list[dict[str, Kept]], list[str]]:
    """Of the files that the index names, or of all."""
    if folder.is_file():
        files = [folder]
    elif (folder / INDEX).exists():
        try:
            listed = json.loads((folder / INDEX).read_text())["weight_map"]
            files = [folder / name for name in sorted(set(listed.values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX}: is not an index of safetensors files, or a damaged one") from None
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file is there")
    kept: dict[str, Kept] = {}
    file_of: dict[str, str] = {}
    faults: list[str] = []
    for file in files:
        for key, tensor in map_safetensors(file).items():
            if key in kept:
                faults.append(f"{key} is doubled: it is in {file_of[key]} and in {file.name}")
            kept[key], file_of[key] = Kept.of(tensor), file.name
    if (folder / INDEX).exists():
        faults += [f"{key} is lost: the index has it in {name}" for key, name in listed.items() if key not in kept]
    return [kept], faults


def create_shards(folder: Path, specs: Specs, shard_bytes: int) -> dict[str, Tensor]:
    """Files of at most so many bytes, or of one tensor, and their index."""
    shards: list[dict[str, Spec]] = [{}]
    size = total = 0
    for key, (shape, dtype) in specs.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = shape, dtype
        size, total = size + nbytes, total + nbytes
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    tensors: dict[str, Tensor] = {}
    for name, shard in zip(names, shards, strict=True):
        tensors |= create_safetensors(folder / name, shard)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + os.linesep)
    return tensors
