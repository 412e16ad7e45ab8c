"""What is done with rows that have come to their experts: the experts' weights, and the way through them and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from moe.activation import Activation


class Stack(NamedTuple):
    """The weights of some experts. up_AHD: [A, fan * hidden, dim]; down_ADF: [A, dim, hidden]; biases may be None."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Rows:
    """A row for each m, sorted by expert: source[index_m], or source[m] where there is no index."""

    source_XD: Tensor
    index_M: Tensor | None

    def pick(self, rows: slice) -> Tensor:
        return self.source_XD[rows] if self.index_M is None else self.source_XD.index_select(0, self.index_M[rows])


@dataclass(frozen=True, eq=False)
class Back:
    """One way back. Given: x, dy, h and the weights of the choices. To be filled, if not None: the gradients of those
    weights, of x, and of the stack's weights, in its order; a batch that makes one elsewhere puts it into `grads`."""

    x: Rows
    g: Rows
    h_MF: Tensor
    weight_M: Tensor | None
    dweight_M: Tensor | None
    drow_XD: Tensor | None
    grads: list[Tensor | None]


class Batch(Protocol):
    """Neighbouring rows that are computed by one call."""

    @property
    def rows(self) -> slice: ...

    def forward(
        self,
        x: Rows,
        stack: Stack,
        activation: Activation,
        *,
        h_MF: Tensor | None,
        result_MD: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """-> h and the results of these rows, in the memory given if any is. h only if it is to be kept."""

    def backward(self, back: Back, stack: Stack, activation: Activation) -> None:
        """The formulas are those of `visit`."""
