"""Trip: the way of rows to a rank's experts and of what they make back, as `visit` needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Add = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""row_XD, place_TK, weight_TK -> of each token the (weighted) rows, added in fp32 or better in the order of k"""


class Trip(Protocol):
    """The way of rows to this rank's experts and of what they make back. M: rows computed here, sorted by expert.

    X rows in a buffer may be more than M: room for what comes home from other ranks.
    """

    @property
    def rows_A(self) -> tuple[int, ...]: ...

    @property
    def index_M(self) -> Tensor | None:
        """Where each row is found among those that `go` brings; None: there they are, in this order."""

    @property
    def room(self) -> int:
        """X - M"""

    def go(self, x_TD: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """-> rows from which index_M picks, and weight_M"""

    def come(self, row_XD: Tensor | None, scalar_M: Tensor | None) -> Tensor | None:
        """The first M rows go back, and what comes home fills the room. -> scalar_N"""

    def total(self, row_XD: Tensor, weight_N: Tensor | None, add: Add) -> Tensor:
        """The (weighted) rows of each token, added. -> y_TD"""


@dataclass(frozen=True, kw_only=True)
class Stay:
    """No way at all: the rows lie here, sorted by expert, and so do the results."""

    rows_A: tuple[int, ...]
    index_M: None = None
    room: int = 0

    def go(self, x_TD: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return x_TD, weight_N

    def come(self, row_XD: Tensor | None, scalar_M: Tensor | None) -> Tensor | None:
        return scalar_M

    def total(self, row_XD: Tensor, weight_N: Tensor | None, add: Add) -> Tensor:
        return row_XD if weight_N is None else (row_XD * weight_N[:, None]).to(row_XD.dtype)
