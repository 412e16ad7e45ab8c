"""Where a piece of a layer lies in the tensors of a file, as a view: what one layout splits, another may join.

A piece (`Piece`) is the least that any layout keeps by itself: an expert's gate [F, D], up [F, D], down [D, F] and
their biases; a layer's router [E, D] and price [E]. A view is both the way to read a piece and the way to write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

OF_EXPERTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
OF_SHARED = tuple(f"shared_{part}" for part in OF_EXPERTS)
OF_LAYERS = ("router", "router_bias", "price", "settled", *OF_SHARED, "shared_switch")

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """layer: the name of the module in its model. expert: its id in the whole layer, None for what is no expert's."""

    layer: str
    expert: int | None
    part: str

    def __str__(self) -> str:
        return (
            f"{self.layer}: {self.part}" if self.expert is None else f"{self.layer}: expert {self.expert} {self.part}"
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one piece, in the tensor named key.

    half: 0 or 1, where gate and up share a tensor, one after the other or row by row (interleaved). transposed: the
    file has [inputs, outputs]. slot: this piece's, of `slots` in a stack; flat: the stack's bytes under a matrix's
    shape, "wide" [D, slots * F] or "tall" [slots * F, D], as grouped matmuls of old kept them. negated: a bias, which
    is a price with the other sign.
    """

    key: str
    half: int | None = None
    interleaved: bool = False
    transposed: bool = False
    slot: int | None = None
    slots: int = 0
    flat: str = ""
    negated: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The piece's numbers in it, sharing memory."""
        if self.slot is not None:
            tensor = self._stack(tensor)[self.slot]
        if self.transposed and tensor.ndim == 2:
            tensor = tensor.T
        if self.half is None:
            return tensor
        rows = len(tensor) // 2
        return tensor[self.half :: 2] if self.interleaved else tensor[self.half * rows : (self.half + 1) * rows]

    def whole(self, piece: Shape) -> Shape:
        """The shape of the tensor that holds a piece of this shape."""
        shape = piece if self.half is None else (piece[0] * 2, *piece[1:])
        if self.transposed:
            shape = shape[::-1]
        if self.slot is None:
            return shape
        if self.flat and len(shape) == 2:
            return (shape[0], self.slots * shape[1]) if self.flat == "wide" else (self.slots * shape[0], shape[1])
        return (self.slots, *shape)

    def _stack(self, tensor: Tensor) -> Tensor:
        if self.flat == "wide":
            return tensor.view(self.slots, tensor.shape[0], -1)
        return tensor.view(self.slots, -1, tensor.shape[1]) if self.flat == "tall" else tensor
