"""DeepSeek's EPLB: a weight tensor [layers, experts] in; its triple of tables out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from placement.formats.source import busy, numbers, whole
from placement.formats.table import flat_LP, from_flat
from placement.plan import Plan
from placement.trace import LoadTrace

KEY = "phy2log"


def read(values: Any, path: Path) -> LoadTrace:
    """One window; or several, of a tensor [windows, layers, experts]."""
    weight = numbers(values, "weight", path, (2, 3))
    return LoadTrace(load_WLE=busy(weight if weight.ndim == 3 else weight[None], "weight", path))


def triple(plan: Plan) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """phy2log [layers, slots], log2phy [layers, experts, most copies] filled with -1, logcnt [layers, experts]."""
    phy2log = flat_LP(plan, "EPLB's tables")
    experts = plan.placement_L[0].num_experts
    logcnt = np.stack([np.bincount(expert_P, minlength=experts) for expert_P in phy2log])
    log2phy = np.full((*logcnt.shape, int(logcnt.max())), -1, dtype=np.int64)
    for layer, expert_P in enumerate(phy2log):
        for expert in range(experts):
            slots = np.flatnonzero(expert_P == expert)
            log2phy[layer, expert, : len(slots)] = slots
    return {KEY: phy2log, "log2phy": log2phy, "logcnt": logcnt}


def write_triple(plan: Plan) -> bytes:
    """As .npz."""
    stream = io.BytesIO()
    tables: dict[str, Any] = triple(plan)
    np.savez(stream, **tables)
    return stream.getvalue()


def read_plan(values: Any, path: Path, ranks: int) -> Plan:
    return from_flat(whole(values[KEY], KEY, path, (2,)), ranks, path)
