"""TensorRT-LLM: the folder of its expert statistics in; the YAML of its load balancer out."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.arrays import FloatArray
from placement.formats.source import MOST_EXPERTS, field, integer, open_values, whole
from placement.formats.table import flat_LP, from_flat
from placement.plan import Plan
from placement.trace import LoadTrace

INTEGERS: dict[str, Any] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "U8": np.dtype("u1"),
}


def read(folder: Path) -> LoadTrace:
    """meta_info.json, and rank*.safetensors of counts keyed "<iteration>_<layer>", added up over ranks.

    Keys with anything behind the layer (such as _raw) hold something else and are passed over.
    """
    meta = folder / "meta_info.json"
    if not meta.exists():
        raise ValueError(f"{folder}: meta_info.json is missing; expected a folder of TensorRT-LLM expert statistics")
    experts = integer(field(open_values(meta), "num_experts", meta), "num_experts", meta, MOST_EXPERTS)
    files = sorted(folder.glob("rank*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no rank*.safetensors; the statistics were not written")
    counts: dict[tuple[int, int], FloatArray] = {}
    for file in files:
        for key, count_E in _tensors(file):
            step, _, number = key.partition("_")
            if not (step.isdigit() and number.isdigit()):
                continue
            if count_E.shape != (experts,) or count_E.min() < 0:
                raise ValueError(f"{file}: field '{key}' must be {experts} counts >= 0; got shape {count_E.shape}")
            place = (int(step), int(number))
            counts[place] = counts.get(place, np.zeros(experts)) + count_E
    if not any(count_E.any() for count_E in counts.values()):
        raise ValueError(f"{folder}: every count is zero; nothing was recorded")
    iterations, layers = (sorted({place[axis] for place in counts}) for axis in (0, 1))
    load_WLE = np.zeros((len(iterations), len(layers), experts))
    for (iteration, layer), count_E in counts.items():
        load_WLE[iterations.index(iteration), layers.index(layer)] = count_E
    try:
        return LoadTrace(load_WLE=load_WLE, layer_L=tuple(layers))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _tensors(path: Path) -> Iterator[tuple[str, FloatArray]]:
    """The integer tensors of a safetensors file: a length, a JSON header of types and offsets, then the bytes."""
    content = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        body = content[8 + length :]
        for key, entry in header.items():
            if key == "__metadata__" or entry["dtype"] not in INTEGERS:
                continue
            start, end = entry["data_offsets"]
            values: NDArray[Any] = np.frombuffer(body[start:end], dtype=INTEGERS[str(entry["dtype"])])
            yield key, values.reshape(entry["shape"]).astype(np.float64)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one: {error}") from None


def write(plan: Plan) -> bytes:
    """Layers by the model's own numbers. Placed once, never updated."""
    expert_LP = flat_LP(plan, "TensorRT-LLM's assignments")
    lines = [f"num_slots: {expert_LP.shape[1]}", "initial_global_assignments:"]
    lines += [f"  {layer}: {experts}" for layer, experts in zip(plan.layer_L, expert_LP.tolist(), strict=True)]
    return ("\n".join([*lines, "layer_updates_per_iter: 0"]) + "\n").encode()


def read_plan(path: Path, ranks: int) -> Plan:
    """The YAML that write makes; not any YAML."""
    rows: dict[int, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip().isdigit() and name.startswith(" "):
            try:
                rows[int(name)] = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError(f"{path}: field 'initial_global_assignments.{name.strip()}' is not a list") from None
    if not rows:
        raise ValueError(f"{path}: field 'initial_global_assignments' is missing or empty")
    layers = sorted(rows)
    table = whole([rows[layer] for layer in layers], "initial_global_assignments", path, (2,))
    return from_flat(table, ranks, path, layers)
