"""The gradient of a weight, against what went through it.

Where a module's output is linear in a weight, y = W h, each of its columns d obeys

    sum over f of W_df dW_df = sum over tokens of y_td dy_td

whatever h and the rest of the module are. The left side is read from the gradient that the optimiser will see, the
right from the passes of all micro-batches and ranks. Their quotient is by how much a gradient was scaled on its way,
and the columns must agree on it, or nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe.doctor.block import Weight

ROUGH = 0.05

Columns = NDArray[np.float64]


@dataclass
class Through:
    """What went through a module since `clear`: sum over tokens of y dy, for each column. guard: of the examiner."""

    guard: Callable[[Callable[[Tensor], None]], Callable[[Tensor], None]]
    total: Columns | None = None

    def watch(self, y: Tensor) -> None:
        if not y.requires_grad:
            return
        value = y.detach()

        def add(dy: Tensor) -> None:
            product = (value.double() * dy.detach().double()).reshape(-1, value.shape[-1]).sum(dim=0).cpu().numpy()
            self.total = product if self.total is None else self.total + product

        y.register_hook(self.guard(add))  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        self.total = None


def columns(weights: Sequence[Weight]) -> Columns | None:
    """sum of W dW for each column of the output, over all the weights; None where a gradient is not to be had."""
    total: Columns | None = None
    for weight in weights:
        value, grad = weight.parameter.detach(), weight.parameter.grad
        if grad is None or type(grad) is not Tensor or grad.is_sparse or grad.shape != value.shape:
            return None
        if weight.counted_A is not None:
            value, grad = value[list(weight.counted_A)], grad[list(weight.counted_A)]
        product_DN = (value.double() * grad.double()).movedim(weight.axis, 0).reshape(value.shape[weight.axis], -1)
        product: Columns = product_DN.sum(dim=1).cpu().numpy()
        total = product if total is None else total + product
    return total


def scale(got: Columns, want: Columns) -> float | None:
    """c of got = c * want, in the least squares; None unless the columns agree."""
    if got.shape != want.shape or not np.isfinite(got).all() or not np.isfinite(want).all():
        return None
    square = float(want @ want)
    if square == 0.0 or len(want) < 2:
        return None
    c = float(got @ want) / square
    return c if c and np.linalg.norm(got - c * want) <= ROUGH * abs(c) * np.linalg.norm(want) else None
