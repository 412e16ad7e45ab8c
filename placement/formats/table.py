"""Generic tables: .npz and .csv in; a plan as one row of slots per layer, the form that most engines start from."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placement.arrays import IntArray
from placement.formats.source import MOST_EXPERTS, busy, integer, numbers, whole
from placement.merge import merge
from placement.plan import EMPTY, Placement, Plan
from placement.trace import LoadTrace

MOST_CELLS = 2**27
LOADS = ("load_WLE", "load", "loads", "weight", "counts")


def read_npz(values: dict[str, Any], path: Path) -> LoadTrace:
    """`load` [layers, experts] or [windows, layers, experts]; or tokens' choices, `ids` or `<task>_ids`
    [tokens, layers, choices], a window named after each task. `num_experts` where the last expert was never chosen.
    """
    for name in LOADS:
        if name in values:
            load = numbers(values[name], name, path, (2, 3))
            return LoadTrace(load_WLE=busy(load if load.ndim == 3 else load[None], name, path))
    tasks = sorted(name for name in values if name == "ids" or name.endswith("_ids"))
    if not tasks:
        found = ", ".join(sorted(values)[:4]) + (", ..." if len(values) > 4 else "")
        plan = "this is a plan, where a trace was expected; " if {"layer_L", "layers"} <= values.keys() else ""
        raise ValueError(
            f"{path}: {plan}found the fields {found}; expected one of {', '.join(LOADS)}, ids or <task>_ids"
        )
    choices = {task: whole(values[task], task, path, (2, 3)) for task in tasks}
    most = max(int(ids.max()) for ids in choices.values()) + 1
    experts = integer(values.get("num_experts", most), "num_experts", path, MOST_EXPERTS)
    return merge([_chosen(ids, experts, task, path) for task, ids in choices.items()])


def _chosen(ids: IntArray, experts: int, task: str, path: Path) -> LoadTrace:
    try:
        expert_TLK = ids if ids.ndim == 3 else ids[:, :, None]
        name = (task.removesuffix("_ids"),) if task != "ids" else ()
        return LoadTrace.from_choices(expert_TLK, num_experts=experts, name_W=name)
    except ValueError as error:
        raise ValueError(f"{path}: field '{task}': {error}") from None


def read_csv(path: Path) -> LoadTrace:
    """A row for each layer, a column for each expert, with no header or 0, 1, ... or expert_0, expert_1, ...; or rows
    of layer, expert, load (and window), with that header. Any other header is of some other table: refused.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = [row for row in csv.reader(file) if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file: {error}") from None
    if not rows:
        raise ValueError(f"{path}: the file is empty")
    header = [cell.strip() for cell in rows[0]]
    if {"layer", "expert", "load"} <= set(header):
        return _long(rows[1:], header, path)
    first = 1
    if _names_experts(header) and len(rows) > 1:
        rows, first = rows[1:], 2
    elif not all(_is_number(cell) for cell in header):
        found = ", ".join(repr(cell) for cell in header[:4]) + (", ..." if len(header) > 4 else "")
        raise ValueError(
            f"{path}: found the columns {found}; expected layer, expert, load (and window), or expert_0, ..., "
            f"or no header"
        )
    for line, row in enumerate(rows, first):
        if len(row) != len(header):
            raise ValueError(f"{path}: field 'rows' is ragged: line {line} has {len(row)} columns, not {len(header)}")
    cells = [[_number(cell, line, path) for cell in row] for line, row in enumerate(rows, first)]
    return LoadTrace(load_WLE=busy(numbers(cells, "rows", path, (2,))[None], "rows", path))


def _names_experts(header: Sequence[str]) -> bool:
    """The numbers from 0 on, in order, bare or all behind one of the usual prefixes."""
    for prefix in ("", "expert_", "expert", "e"):
        if list(header) == [f"{prefix}{expert}" for expert in range(len(header))]:
            return True
    return False


def _long(rows: Sequence[Sequence[str]], header: Sequence[str], path: Path) -> LoadTrace:
    names = [name for name in ("window", "layer", "expert", "load") if name in header]
    if len(set(header)) < len(header) or len(names) < len(header):
        raise ValueError(f"{path}: found the columns {', '.join(header[:6])}; expected layer, expert, load and window")
    if any(len(row) != len(header) for row in rows) or not rows:
        raise ValueError(f"{path}: field 'rows' is ragged or empty; expected {len(header)} columns in every row")
    column = {n: [_number(row[header.index(n)], i, path) for i, row in enumerate(rows, 2)] for n in names}
    place = [whole(column[name], name, path, (1,)) for name in names[:-1]]
    if math.prod(int(values.max()) + 1 for values in place) > MOST_CELLS:
        raise ValueError(
            f"{path}: fields {', '.join(names[:-1])} span more than {MOST_CELLS} loads, nearly all missing"
        )
    if any(values.min() < 0 for values in place):
        raise ValueError(f"{path}: windows, layers and experts are numbered from 0")
    if "window" not in column:
        place.insert(0, np.zeros(len(rows), dtype=np.int64))
    load_WLE = np.zeros([int(values.max()) + 1 for values in place])
    np.add.at(load_WLE, tuple(place), numbers(column["load"], "load", path, (1,)))
    return LoadTrace(load_WLE=busy(load_WLE, "load", path))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, line: int, path: Path) -> float:
    if not _is_number(cell):
        raise ValueError(f"{path}: line {line}: {cell!r} is not a number")
    return float(cell)


def flat_LP(plan: Plan, engine: str) -> IntArray:
    """The expert in each slot, the slots of rank 0 first. For engines that want as many slots on every rank, filled."""
    counts = {int(count) for p in plan.placement_L for count in (p.expert_RS != EMPTY).sum(axis=1)}
    if len(counts) > 1:
        raise ValueError(
            f"{engine} need as many experts on every rank; this plan has {min(counts)} to {max(counts)}: use slots "
            f"that divide by the ranks, all filled"
        )
    return np.stack([p.expert_RS[p.expert_RS != EMPTY] for p in plan.placement_L])


def from_flat(expert_LP: IntArray, ranks: int, path: Path, layer_L: Sequence[int] = ()) -> Plan:
    slots = expert_LP.shape[1]
    if ranks < 1 or slots % ranks:
        raise ValueError(f"{path}: {slots} slots do not divide over {ranks} ranks; say how many ranks it was made for")
    placement_L = []
    for layer, expert_P in enumerate(expert_LP):
        try:
            placement_L.append(Placement(expert_RS=expert_P.reshape(ranks, -1)))
        except ValueError as error:
            raise ValueError(f"{path}: layer {layer}: {error}") from None
    return Plan(placement_L=tuple(placement_L), layer_L=tuple(layer_L))
