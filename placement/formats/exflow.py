"""ExFlow: top-1 choices [tokens, layers] in; the rank of each expert of each layer, as CSV, out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from placement.formats.source import whole
from placement.packing import placements, table_of
from placement.plan import Plan
from placement.topology import Topology
from placement.trace import LoadTrace


def read(values: Any, path: Path) -> LoadTrace:
    ids = whole(values, "choices", path, (2,))
    return LoadTrace.from_choices(ids[:, :, None], num_experts=int(ids.max()) + 1)


def write(plan: Plan) -> bytes:
    """A row for each layer, a column for each expert."""
    if any((placement.copies_E > 1).any() for placement in plan.placement_L):
        raise ValueError("ExFlow's placements hold one copy of each expert; plan with as many slots as experts")
    rows = [",".join(str(rank) for rank in placement.home_E.tolist()) for placement in plan.placement_L]
    return ("\n".join(rows) + "\n").encode()


def read_plan(path: Path, ranks: int) -> Plan:
    try:
        rows = [[int(cell) for cell in line.split(",")] for line in path.read_text(encoding="utf-8").split()]
    except ValueError as error:
        raise ValueError(f"{path}: expected a rank in every cell: {error}") from None
    rank_LE = whole(rows, "ranks", path, (2,))
    if rank_LE.min() < 0 or rank_LE.max() >= ranks:
        raise ValueError(f"{path}: ranks from {rank_LE.min()} to {rank_LE.max()}; there are {ranks}")
    most = max(int(np.bincount(rank_E, minlength=ranks).max()) for rank_E in rank_LE)
    table = table_of(rank_LE, Topology.even(ranks=ranks, slots=most, ranks_per_node=ranks))
    return Plan(placement_L=placements(table))
