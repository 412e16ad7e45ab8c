"""Tables from outside made safe to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def frozen(values: ArrayLike, dtype: DTypeLike, name: str) -> NDArray[Any]:
    """A read-only copy of the numbers, refused where they are ragged, not numbers, or lose their fraction."""
    whole = np.dtype(dtype).kind == "i"
    try:
        array = np.array(values)
        if array.size and (array.dtype.kind not in "iuf" or (whole and array.dtype.kind == "f" and (array % 1).any())):
            raise ValueError
        array = array.astype(dtype)
    except (TypeError, ValueError):
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"{name} must be a table of {kind}, every row of one length") from None
    array.setflags(write=False)
    return array
