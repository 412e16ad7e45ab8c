"""What several scenarios cost together."""

from __future__ import annotations

import math

import numpy as np

from placement.arrays import FloatArray


def risk(value: FloatArray, tail: float) -> FloatArray:
    """value [..., K] -> [...]: the mean of the largest tail x K, the last of them in part; of one at least.

    tail = 0 is the worst of all, 1 the mean of all, between lies the conditional value at risk.
    """
    scenarios = value.shape[-1]
    counted = max(tail * scenarios, 1.0)
    if counted == 1:
        worst: FloatArray = value.max(axis=-1)
        return worst
    if counted == scenarios:
        mean: FloatArray = value.mean(axis=-1)
        return mean
    weight_K = np.clip(counted - np.arange(math.ceil(counted)), 0, 1) / counted
    tail_mean: FloatArray = -np.sort(-value, axis=-1)[..., : len(weight_K)] @ weight_K
    return tail_mean
