"""Several recordings of one model as one trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.trace import NOBODY, LoadTrace


def merge(traces: Sequence[LoadTrace]) -> LoadTrace:
    """The windows of all traces, in order. Pair masses are added up; tokens are kept where every trace has them."""
    if not traces:
        raise ValueError("nothing to merge; give at least one trace")
    first = traces[0]
    for trace in traces[1:]:
        if (trace.num_experts, trace.layer_L) != (first.num_experts, first.layer_L):
            raise ValueError(
                f"cannot merge {first.layers} layers x {first.num_experts} experts with {trace.layers} x "
                f"{trace.num_experts}; merge traces of one model, with the same layers"
            )
    pairs = [trace.pair_LEE for trace in traces if trace.pair_LEE is not None]
    choices = [_choices(trace) for trace in traces]
    start = np.cumsum([0, *(trace.windows for trace in traces)])
    known = all(trace.expert_TLK is not None for trace in traces)
    widest = max((expert_TLK.shape[2] for expert_TLK, _ in choices), default=0)
    name_W = [name for trace in traces for name in (trace.name_W or ("",) * trace.windows)]
    return LoadTrace(
        load_WLE=np.concatenate([trace.load_WLE for trace in traces]),
        expert_TLK=np.concatenate([_widened(expert_TLK, widest) for expert_TLK, _ in choices]) if known else None,
        window_T=np.concatenate([w + at for (_, w), at in zip(choices, start, strict=False)]) if known else None,
        pair_LEE=np.sum(pairs, axis=0) if len(pairs) == len(traces) else None,
        name_W=tuple(name_W) if any(name_W) else (),
        layer_L=first.layer_L,
        layers_in_model=max(trace.layers_in_model for trace in traces),
    )


def _choices(trace: LoadTrace) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    if trace.expert_TLK is None or trace.window_T is None:
        return np.zeros((0, trace.layers, 0), dtype=np.int32), np.zeros(0, dtype=np.int64)
    return trace.expert_TLK, trace.window_T


def _widened(expert_TLK: NDArray[np.int32], choices: int) -> NDArray[np.int32]:
    return np.pad(expert_TLK, ((0, 0), (0, 0), (0, choices - expert_TLK.shape[2])), constant_values=NOBODY)
