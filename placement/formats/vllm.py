"""vLLM: a window of loads per slot, with its map, in; the map out. vllm-ascend: its expert-map JSON out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from placement.formats.source import field, numbers, to_logical, whole
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
            "layer_id": layer,
            "device_count": plan.ranks,
            "device_list": [
                {"device_id": rank, "device_expert": placement.experts_of(rank).tolist()} for rank in range(plan.ranks)
            ],
        }
        for layer, placement in enumerate(plan.placement_L)
    ]
    return (json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n").encode()


def read_ascend(values: Any, path: Path) -> Plan:
    if "layer_list" not in values:
        raise ValueError(f"{path}: not a plan of ours or of an engine: field 'layer_list' is missing")
    placement_L = []
    for index, layer in enumerate(values["layer_list"]):
        rows = [list(field(device, "device_expert", path)) for device in field(layer, "device_list", path)]
        width = max(len(row) for row in rows)
        try:
            placement_L.append(Placement(expert_RS=np.array([row + [EMPTY] * (width - len(row)) for row in rows])))
        except ValueError as error:
            raise ValueError(f"{path}: layer_list[{index}]: {error}") from None
    return Plan(placement_L=tuple(placement_L))
