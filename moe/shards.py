"""Weights as safetensors, to take a model elsewhere: a file for each rank and an index, as Hugging Face lays them out.

Names are the model's own; an expert's has its number in it: <layer>.experts.<expert>.<weight>.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.comm import EVERYONE, Everyone, Group, Peers, gather_objects
from moe.named import keep_sums, misfits, raise_alike, tensors_to_load, tensors_to_save

INDEX = "model.safetensors.index.json"


def export_safetensors(model: nn.Module, folder: str | os.PathLike[str], *, group: Group | Everyone = EVERYONE) -> None:
    """Into a folder that all ranks see and that has no such export yet. Every rank of the group must call."""
    peers, target = Peers.of(group), Path(folder)
    if gather_objects((target / INDEX).exists(), peers)[0]:
        raise ValueError(f"{target} holds an export already; give another folder")
    tensors = tensors_to_save(model, peers)
    named_by = gather_objects(sorted(tensors), peers)
    # What several ranks have, the first of them writes.
    file_of = {name: _file(rank, peers.size) for rank in reversed(range(peers.size)) for name in named_by[rank]}
    mine = {name: tensor for name, tensor in tensors.items() if file_of[name] == _file(peers.rank, peers.size)}
    target.mkdir(parents=True, exist_ok=True)
    if mine:
        _safetensors().save_file({name: t.detach().cpu().contiguous().clone() for name, t in mine.items()},
                                 target / _file(peers.rank, peers.size))  # fmt: skip
    sizes = gather_objects(sum(tensor.nbytes for tensor in mine.values()), peers)
    if peers.rank == 0:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(file_of.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=1))
    gather_objects(None, peers)  # nobody goes on before it is whole


@torch.no_grad()
def import_safetensors(model: nn.Module, source: str | os.PathLike[str], *, group: Group | Everyone = EVERYONE) -> None:
    """From a file, or a folder of them, wherever the model's experts live. An expert that is missing, in two files, or
    of another shape is one error on every rank, and nothing is changed."""
    peers = Peers.of(group)
    faults: list[str] = []
    place: dict[str, Path] = {}
    try:
        place, shapes, faults = _read_headers(Path(source))
        faults += misfits(shapes, model)
    except (ValueError, OSError) as error:
        faults = [str(error)]
    raise_alike(source, faults, peers)
    targets = {name: tensor for name, tensor in tensors_to_load(model).items() if name in place}
    for file in sorted(set(place.values())):
        with _safetensors_open(file) as opened:
            for name, tensor in targets.items():
                if place[name] == file:
                    tensor.copy_(opened.get_tensor(name))
    keep_sums(model, targets, peers)


def _read_headers(source: Path) -> tuple[dict[str, Path], Mapping[str, tuple[int, ...]], list[str]]:
    """(the file of each tensor, its shape, names that are in two files)"""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError("no .safetensors file is there")
    place: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    faults = []
    for file in files:
        with _safetensors_open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                if name in place:
                    faults.append(f"{name} is in {place[name].name} and in {file.name}")
                place[name], shapes[name] = file, tuple(opened.get_slice(name).get_shape())
    return place, shapes, faults


def _file(rank: int, ranks: int) -> str:
    return f"model-{rank + 1:05}-of-{ranks:05}.safetensors"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("safetensors is not installed; pip install safetensors") from None
    return safetensors.torch


def _safetensors_open(file: Path) -> Any:
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None
