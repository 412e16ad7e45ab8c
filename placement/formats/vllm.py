"""vLLM: a window of loads per slot, with its map, in; the map out. vllm-ascend: its expert-map JSON out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from placement.formats.source import field, integer, listed, numbers, to_logical, whole
from placement.formats.table import flat_LP, from_flat
from placement.plan import EMPTY, Placement, Plan
from placement.trace import LoadTrace

LOAD, MAP = "expert_load_window", "physical_to_logical_map"


def knows(values: Any) -> bool:
    return isinstance(values, dict) and LOAD in values


def read(values: Any, path: Path) -> LoadTrace:
    """expert_load_window [windows, layers, slots], physical_to_logical_map [layers, slots]; unused windows are zero."""
    count = numbers(field(values, LOAD, path), LOAD, path, (2, 3))
    expert_LP = whole(field(values, MAP, path), MAP, path, (2,))
    load_WLE = to_logical(count if count.ndim == 3 else count[None], expert_LP, path)
    used = load_WLE.sum(axis=(1, 2)) > 0
    if not used.any():
        raise ValueError(f"{path}: field '{LOAD}' is zero everywhere; nothing was recorded")
    return LoadTrace(load_WLE=load_WLE[used])


def write(plan: Plan) -> bytes:
    """[layers, slots] as .npy."""
    stream = io.BytesIO()
    np.save(stream, flat_LP(plan, "vLLM's maps"))
    return stream.getvalue()


def read_plan(values: Any, path: Path, ranks: int) -> Plan:
    return from_flat(whole(values, MAP, path, (2,)), ranks, path)


def write_ascend(plan: Plan) -> bytes:
    """Ranks may hold different numbers of experts."""
    layers = [
        {
            "layer_id": number,
            "device_count": plan.ranks,
            "device_list": [
                {"device_id": rank, "device_expert": placement.experts_of(rank).tolist()} for rank in range(plan.ranks)
            ],
        }
        for number, placement in zip(plan.layer_L, plan.placement_L, strict=True)
    ]
    return (json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n").encode()


def read_ascend(values: Any, path: Path) -> Plan:
    """Layers and devices by their numbers, in whatever order the file lists them."""
    if not isinstance(values, dict) or "layer_list" not in values:
        raise ValueError(f"{path}: not a plan of ours or of an engine: field 'layer_list' is missing")
    layers = listed(values["layer_list"], "layer_list", path)
    _check_count(values, "moe_layer_count", len(layers), "", path)
    placed: dict[int, Placement] = {}
    for index, layer in enumerate(layers):
        where = f"layer_list[{index}]"
        number = integer(field(layer, "layer_id", path), f"{where}.layer_id", path)
        if number in placed:
            raise ValueError(f"{path}: field '{where}.layer_id' is {number}, as in a layer before it")
        placed[number] = _ascend_layer(layer, where, path)
    order = sorted(placed)
    return Plan(placement_L=tuple(placed[number] for number in order), layer_L=tuple(order))


def _ascend_layer(layer: Any, where: str, path: Path) -> Placement:
    devices = listed(field(layer, "device_list", path), f"{where}.device_list", path)
    _check_count(layer, "device_count", len(devices), f"{where}.", path)
    held: dict[int, list[int]] = {}
    for index, device in enumerate(devices):
        name = f"{where}.device_list[{index}]"
        rank = integer(field(device, "device_id", path), f"{name}.device_id", path)
        if rank in held or rank >= len(devices):
            raise ValueError(
                f"{path}: field '{name}.device_id' is {rank}; expected each of 0 to {len(devices) - 1} once"
            )
        experts = field(device, "device_expert", path)
        # A device may hold none.
        held[rank] = [] if experts == [] else whole(experts, f"{name}.device_expert", path, (1,)).tolist()
    width = max(len(experts) for experts in held.values())
    rows = [held[rank] + [EMPTY] * (width - len(held[rank])) for rank in range(len(devices))]
    try:
        return Placement(expert_RS=np.array(rows, dtype=np.int64).reshape(len(rows), width))
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {error}") from None


def _check_count(values: Any, name: str, count: int, where: str, path: Path) -> None:
    if name in values and integer(values[name], f"{where}{name}", path) != count:
        raise ValueError(f"{path}: field '{where}{name}' is {values[name]}, but {count} are listed")
