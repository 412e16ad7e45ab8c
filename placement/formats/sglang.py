"""SGLang: its expert-distribution recorder in, `--init-expert-location` out.

The recorder writes `stat` (counts per step, already summed over ranks: read one file only), `per_pass` and `per_token`
(one file a rank: give them all), and JSON. What goes in may hold one key and no other: the rest would be passed on as
arguments. It has a row for every layer of the model, dense ones too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placement.arrays import IntArray
from placement.formats.source import PADDING, field, integer, listed, numbers, to_logical, whole, without_dense
from placement.formats.table import flat_LP, from_flat
from placement.plan import Plan
from placement.trace import LoadTrace

KEY = "physical_to_logical_map"
UNKNOWN = -1


def knows(values: Any) -> bool:
    return isinstance(values, dict) and ("logical_count" in values or "records" in values)


def ranks_of_one(values: Any) -> bool:
    """Whether a file may be one rank's part of a recording, to be added up with the others' pass by pass."""
    return isinstance(values, dict) and "records" in values


def read(values: Any, path: Path) -> LoadTrace:
    if ranks_of_one(values):
        return read_ranks([(values, path)])
    count = numbers(values["logical_count"], "logical_count", path, (2, 3))
    load_WLE, layer_L = without_dense(count if count.ndim == 3 else count[None], "logical_count", path)
    return LoadTrace(load_WLE=load_WLE, layer_L=layer_L, layers_in_model=count.shape[-2])


def read_ranks(parts: Sequence[tuple[Any, Path]]) -> LoadTrace:
    """The per_pass or per_token files of one recording, one from each rank. A pass is one window."""
    files = [_recorded(values, path) for values, path in parts]
    first, seen = files[0], set[tuple[int, int]]()
    for file in files:
        here = set(zip(file.pass_N, file.rank_N, strict=True)) - {(passed, UNKNOWN) for passed in file.pass_N}
        if again := sorted(seen & here):
            passed, rank = again[0]
            raise ValueError(
                f"{file.path}: pass {passed} of rank {rank} is in another file as well; give the files of one recording"
            )
        seen |= here
        if (file.tokens, file.layers, file.experts) != (first.tokens, first.layers, first.experts):
            raise ValueError(
                f"{file.path}: {file.layers} layers x {file.experts} experts in records of one kind, but {first.path} "
                f"has {first.layers} x {first.experts} or another kind; give the files of one recording"
            )
    return _followed(files) if first.tokens else _counted(files)


@dataclass(frozen=True)
class _File:
    """One rank's records, each with its pass and its rank (-1 where the file does not say)."""

    path: Path
    records: list[Any]
    expert_LP: IntArray
    pass_N: list[int]
    rank_N: list[int]

    @property
    def tokens(self) -> bool:
        return "topk_ids_of_layer" in self.records[0]

    @property
    def layers(self) -> int:
        return len(self.expert_LP)

    @property
    def experts(self) -> int:
        return int(self.expert_LP.max()) + 1


def _recorded(values: Any, path: Path) -> _File:
    records = listed(values["records"], "records", path)
    expert_LP = whole(field(values, f"last_{KEY}", path), f"last_{KEY}", path, (2,))
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: field 'records' must hold a mapping for each pass")
    wanted = "topk_ids_of_layer" if "topk_ids_of_layer" in records[0] else "global_physical_count"
    pass_N, rank_N = [], []
    for index, record in enumerate(records):
        name = f"records[{index}]"
        for required in (wanted, "forward_pass_id"):
            if required not in record:
                raise ValueError(f"{path}: field '{name}.{required}' is missing")
        pass_N.append(integer(record["forward_pass_id"], f"{name}.forward_pass_id", path))
        rank_N.append(integer(record["rank"], f"{name}.rank", path) if "rank" in record else UNKNOWN)
    return _File(path, records, expert_LP, pass_N, rank_N)


def _windows(files: Sequence[_File]) -> dict[int, int]:
    """The window of each pass."""
    return {passed: window for window, passed in enumerate(sorted({p for file in files for p in file.pass_N}))}


def _counted(files: Sequence[_File]) -> LoadTrace:
    first = files[0]
    window = _windows(files)
    load_WLE = np.zeros((len(window), first.layers, first.experts))
    for file in files:
        count_WLP = np.zeros((len(window), *file.expert_LP.shape))
        for index, (record, passed) in enumerate(zip(file.records, file.pass_N, strict=True)):
            name = f"records[{index}].global_physical_count"
            count_LP = numbers(record["global_physical_count"], name, file.path, (2,))
            if count_LP.shape != file.expert_LP.shape:
                raise ValueError(
                    f"{file.path}: field '{name}' has shape {count_LP.shape}, but the map {file.expert_LP.shape}"
                )
            count_WLP[window[passed]] += count_LP
        load_WLE += to_logical(count_WLP, file.expert_LP, file.path)
    load_WLE, layer_L = without_dense(load_WLE, "global_physical_count", first.path)
    return LoadTrace(load_WLE=load_WLE, layer_L=layer_L, layers_in_model=first.layers)


def _followed(files: Sequence[_File]) -> LoadTrace:
    """Tokens of a pass are one window, whatever ranks saw them; windows in the order of their passes."""
    window = _windows(files)
    parts = [
        (window[passed], _chosen(record, f"records[{index}].topk_ids_of_layer", file))
        for file in files
        for index, (record, passed) in enumerate(zip(file.records, file.pass_N, strict=True))
    ]
    parts.sort(key=lambda part: part[0])
    widest = max(expert_TLK.shape[2] for _, expert_TLK in parts)
    if any(expert_TLK.shape[2] != widest for _, expert_TLK in parts):
        raise ValueError(f"{files[0].path}: field 'topk_ids_of_layer' has records of different choices a token")
    expert_TLK = np.concatenate([expert_TLK for _, expert_TLK in parts])
    busy_L = np.flatnonzero((expert_TLK != PADDING).any(axis=(0, 2)))
    if not busy_L.size:
        raise ValueError(f"{files[0].path}: field 'records' holds no choice; nothing was recorded")
    return LoadTrace.from_choices(
        expert_TLK[:, busy_L],
        num_experts=files[0].experts,
        window_T=np.repeat([at for at, _ in parts], [len(expert_TLK) for _, expert_TLK in parts]),
        layer_L=busy_L.tolist(),
        layers_in_model=files[0].layers,
    )


def _chosen(record: Any, name: str, file: _File) -> IntArray:
    """Choices are slots: through the map to experts. Padding rows, -1 in every layer, are no tokens."""
    slot_LTK, expert_LP = whole(record["topk_ids_of_layer"], name, file.path, (3,)), file.expert_LP
    if len(slot_LTK) != len(expert_LP) or slot_LTK.max() >= expert_LP.shape[1]:
        raise ValueError(
            f"{file.path}: {name} has {len(slot_LTK)} layers and slots up to {slot_LTK.max()}; the map has "
            f"{expert_LP.shape[0]} x {expert_LP.shape[1]}"
        )
    mapped_LTK = expert_LP[np.arange(len(slot_LTK))[:, None, None], np.maximum(slot_LTK, 0)]
    expert_TLK: IntArray = np.where(slot_LTK == PADDING, PADDING, mapped_LTK).transpose(1, 0, 2)
    chosen: IntArray = expert_TLK[(expert_TLK != PADDING).any(axis=(1, 2))]
    return chosen


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
