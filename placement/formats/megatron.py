"""Megatron-LM: its router trace in; a permutation of experts for checkpoint conversion out (it takes no placement)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placement.arrays import IntArray
from placement.formats.source import field, integer, json_values, whole
from placement.formats.table import flat_LP, from_flat
from placement.plan import Plan
from placement.trace import LoadTrace

KEY = "expert_permutation"
# Added to the numbers of prediction layers while reading, to keep them apart and last.
MTP = 1_000_000


Choices = dict[tuple[int, int, int], IntArray]


def read(paths: Sequence[Path]) -> LoadTrace:
    """A line for each (step, layer, rank): {"step", "layer", "rank", "top_indices" [tokens, choices]}; a window a step.

    The files of one recording together, one from each rank: a step is one window, whatever ranks wrote it.
    Layers of multi-token prediction (mtp_idx) come after the others. Tokens are followed from layer to layer where
    every layer saw as many of each rank's, and their loads alone are kept where not.
    """
    choices: Choices = {}
    for path in paths:
        here = _records(path)
        if again := sorted(choices.keys() & here.keys()):
            step, rank, layer = again[0]
            raise ValueError(
                f"{path}: step {step}, rank {rank}, layer {layer} is in another file as well; give it once"
            )
        choices |= here
    if all((expert_TK < 0).all() for expert_TK in choices.values()):
        raise ValueError(f"{paths[0]}: field 'top_indices' holds no choice; nothing was traced")
    return _trace(choices)


def _records(path: Path) -> Choices:
    choices: Choices = {}
    for line, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        record = json_values(text, f"{path}: line {line}")
        for name in ("step", "layer", "rank", "top_indices"):
            if not isinstance(record, dict) or name not in record:
                raise ValueError(f"{path}: line {line}: field '{name}' is missing")
        expert_TK = whole(record["top_indices"], f"top_indices, line {line}", path, (2,))
        step, rank, layer = (integer(record[name], f"{name}, line {line}", path) for name in ("step", "rank", "layer"))
        if layer >= MTP:
            raise ValueError(f"{path}: field 'layer, line {line}' is {layer}; no model has so many")
        predicted = record.get("mtp_idx")
        if predicted is not None:
            layer += MTP * (1 + integer(predicted, f"mtp_idx, line {line}", path))
        if (step, rank, layer) in choices:
            raise ValueError(f"{path}: line {line}: step {step}, rank {rank}, layer {record['layer']} a second time")
        choices[step, rank, layer] = expert_TK
    if not choices:
        raise ValueError(f"{path}: no records; nothing was traced")
    return choices


def _trace(choices: Choices) -> LoadTrace:
    steps, ranks, layers = (sorted({place[axis] for place in choices}) for axis in range(3))
    experts = max(int(expert_TK.max()) for expert_TK in choices.values()) + 1
    last = max(layer for layer in layers if layer < MTP) if layers[0] < MTP else -1
    late = [layer for layer in layers if layer >= MTP]
    layer_L = [layer if layer < MTP else last + 1 + late.index(layer) for layer in layers]
    parts: list[Any] = []
    window_T: list[int] = []
    for window, step in enumerate(steps):
        for rank in ranks:
            mine = [choices.get((step, rank, layer)) for layer in layers]
            shapes = {table.shape for table in mine if table is not None}
            if len(shapes) != 1 or any(table is None for table in mine):
                return _loads(choices, steps, layers, layer_L, experts)
            parts.append(np.stack([table for table in mine if table is not None], axis=1))
            window_T += [window] * len(parts[-1])
    return LoadTrace.from_choices(np.concatenate(parts), num_experts=experts, window_T=window_T, layer_L=layer_L)


def _loads(choices: Choices, steps: list[int], layers: list[int], layer_L: list[int], experts: int) -> LoadTrace:
    load_WLE = np.zeros((len(steps), len(layers), experts))
    for (step, _, layer), expert_TK in choices.items():
        made = expert_TK[expert_TK >= 0]
        load_WLE[steps.index(step), layers.index(layer)] += np.bincount(made, minlength=experts)
    return LoadTrace(load_WLE=load_WLE, layer_L=tuple(layer_L))


def write(plan: Plan) -> bytes:
    """For each layer, which expert comes first, second, ... once the checkpoint's experts are in the plan's order."""
    expert_LP = flat_LP(plan, "Megatron's checkpoints")
    if expert_LP.shape[1] != plan.placement_L[0].num_experts:
        raise ValueError("a permutation has no room for copies; plan with as many slots as experts")
    rows = {str(layer): experts for layer, experts in zip(plan.layer_L, expert_LP.tolist(), strict=True)}
    return (json.dumps({KEY: rows}) + "\n").encode()


def read_plan(values: Any, path: Path, ranks: int) -> Plan:
    rows = field(values, KEY, path)
    if not isinstance(rows, dict) or not rows or not all(layer.isdecimal() for layer in rows):
        raise ValueError(f"{path}: field '{KEY}' must give a row for each layer's number; got {str(rows)[:60]}")
    named = {int(layer): row for layer, row in rows.items()}
    layers = sorted(named)
    return from_flat(whole([named[layer] for layer in layers], KEY, path, (2,)), ranks, path, layers)
