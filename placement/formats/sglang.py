"""SGLang: its expert-distribution recorder in, `--init-expert-location` out.

The recorder writes `stat` (counts per step, already summed over ranks: read one file only), `per_pass` and `per_token`
(one file a rank: give them all), and JSON. What goes in may hold one key and no other: the rest would be passed on as
arguments. It has a row for every layer of the model, dense ones too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from placement.arrays import IntArray
from placement.formats.source import PADDING, field, numbers, to_logical, whole, without_dense
from placement.formats.table import flat_LP, from_flat
from placement.plan import Plan
from placement.trace import LoadTrace

KEY = "physical_to_logical_map"


def knows(values: Any) -> bool:
    return isinstance(values, dict) and ("logical_count" in values or "records" in values)


def read(values: Any, path: Path) -> LoadTrace:
    if "records" in values:
        return _recorded(values, path)
    count = numbers(values["logical_count"], "logical_count", path, (2, 3))
    load_WLE, layer_L = without_dense(count if count.ndim == 3 else count[None], "logical_count", path)
    return LoadTrace(load_WLE=load_WLE, layer_L=layer_L, layers_in_model=count.shape[-2])


def _recorded(values: Any, path: Path) -> LoadTrace:
    records = values["records"]
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: field 'records' must be a list with a record for each pass")
    expert_LP = whole(field(values, f"last_{KEY}", path), f"last_{KEY}", path, (2,))
    if all(isinstance(record, dict) and "topk_ids_of_layer" in record for record in records):
        return _per_token(records, expert_LP, path)
    passes: dict[int, Any] = {}
    for index, record in enumerate(records):
        name = f"records[{index}].global_physical_count"
        count_LP = numbers(field(record, "global_physical_count", path), name, path, (2,))
        passed = int(field(record, "forward_pass_id", path))
        passes[passed] = passes.get(passed, 0) + count_LP
    count_WLP = np.stack([passes[passed] for passed in sorted(passes)])
    load_WLE, layer_L = without_dense(to_logical(count_WLP, expert_LP, path), "global_physical_count", path)
    return LoadTrace(load_WLE=load_WLE, layer_L=layer_L, layers_in_model=len(expert_LP))


def _per_token(records: list[Any], expert_LP: IntArray, path: Path) -> LoadTrace:
    """Choices are slots: through the map to experts. Padding rows, -1 in every layer, are no tokens."""
    passes = sorted({int(field(record, "forward_pass_id", path)) for record in records})
    chosen, window_T = [], []
    for index, record in enumerate(records):
        slot_LTK = whole(record["topk_ids_of_layer"], f"records[{index}].topk_ids_of_layer", path, (3,))
        if len(slot_LTK) != len(expert_LP) or slot_LTK.max() >= expert_LP.shape[1]:
            raise ValueError(
                f"{path}: records[{index}].topk_ids_of_layer has {len(slot_LTK)} layers and slots up to "
                f"{slot_LTK.max()}; the map has {expert_LP.shape[0]} x {expert_LP.shape[1]}"
            )
        mapped_LTK = expert_LP[np.arange(len(slot_LTK))[:, None, None], np.maximum(slot_LTK, 0)]
        expert_LTK = np.where(slot_LTK == PADDING, PADDING, mapped_LTK)
        expert_TLK = expert_LTK.transpose(1, 0, 2)
        expert_TLK = expert_TLK[(expert_TLK != PADDING).any(axis=(1, 2))]
        chosen.append(expert_TLK)
        window_T += [passes.index(int(record["forward_pass_id"]))] * len(expert_TLK)
    expert_TLK = np.concatenate(chosen)
    busy_L = np.flatnonzero((expert_TLK != PADDING).any(axis=(0, 2)))
    if not busy_L.size:
        raise ValueError(f"{path}: field 'records' holds no choice; nothing was recorded")
    return LoadTrace.from_choices(
        expert_TLK[:, busy_L],
        num_experts=int(expert_LP.max()) + 1,
        window_T=np.array(window_T),
        layer_L=busy_L.tolist(),
        layers_in_model=len(expert_LP),
    )


def write(plan: Plan, layers_in_model: int) -> bytes:
    """A dense layer's row deals the experts out in order; the engine does not look at it."""
    expert_LP = flat_LP(plan, "SGLang's maps")
    layers = max(layers_in_model, plan.layer_L[-1] + 1)
    everyone_LP = np.repeat(np.arange(expert_LP.shape[1])[None] % plan.placement_L[0].num_experts, layers, axis=0)
    everyone_LP[list(plan.layer_L)] = expert_LP
    return (json.dumps({KEY: everyone_LP.tolist()}) + "\n").encode()


def read_plan(values: Any, path: Path, ranks: int) -> Plan:
    """Every row is a layer here: the file does not say which are dense."""
    return from_flat(whole(field(values, KEY, path), KEY, path, (2,)), ranks, path)
