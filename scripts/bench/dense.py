"""The floors under every layer of experts: matmuls of the same FLOPs and nothing else, no routing, no activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def dense(make: Callable[[int, int], Tensor], rows: int, dim: int, hidden: int, backward: bool) -> Callable[[], None]:
    """Two matmuls of all rows, six with backward, into memory that is there already. make: a random matrix."""
    x_ND, h_NF, a_NF, y_ND = make(rows, dim), make(rows, 2 * hidden), make(rows, hidden), make(rows, dim)
    up, down, dh_NF = make(2 * hidden, dim), make(dim, hidden), make(rows, 2 * hidden)
    dup, ddown = torch.empty_like(up), torch.empty_like(down)

    def once() -> None:
        torch.mm(x_ND, up.t(), out=h_NF)
        torch.mm(a_NF, down.t(), out=y_ND)
        if backward:
            torch.mm(y_ND, down, out=a_NF)
            torch.mm(y_ND.t(), a_NF, out=ddown)
            torch.mm(dh_NF.t(), x_ND, out=dup)
            torch.mm(dh_NF, up, out=y_ND)

    return once


def by_expert(
    make: Callable[[int, int], Tensor], rows_E: Sequence[int], dim: int, hidden: int, backward: bool
) -> Callable[[], None]:
    """The same, one expert after the other, each with weights of its own and its own number of rows."""
    runs = [dense(make, rows, dim, hidden, backward) for rows in rows_E if rows]

    def once() -> None:
        for run in runs:
            run()

    return once
