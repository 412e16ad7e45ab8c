"""Stock: the experts that a member truly holds, layer by layer, more perhaps than the table puts there.

An expert that arrives is in the stack before the table knows of it, and one that left stays until nobody can need it:
neither gets rows. So changing tables moves no weight, and a layer is only ever copied by itself, in the background.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.belongings import Belongings, layers_of, packed, padded_bytes, restacked
from moe.layer import MoE


class Stock:
    """Of one model. Layers are numbered as in a plan. A thread that packs or restacks a layer sees it as it was before
    it is taken over, or as it is after: whose experts are in which slot goes with the slots."""

    def __init__(self, model: nn.Module) -> None:
        self._whole = threading.Lock()
        self.layers: list[MoE] = list(layers_of(model).values())
        self.names: list[str] = list(layers_of(model))

    @property
    def held_L(self) -> tuple[tuple[int, ...], ...]:
        return tuple(layer.experts.expert_ids for layer in self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].experts.up.device

    def parcel_bytes(self, layer: int) -> int:
        """What an expert weighs on its way."""
        return padded_bytes(Belongings.of(self.layers[layer], None).expert_bytes)

    @torch.no_grad()
    def pack(self, layer: int, expert: int) -> Tensor:
        ids, belongings = self._now(layer)
        return packed(belongings.stacked, ids.index(expert), belongings.expert_bytes)

    @torch.no_grad()
    def rows_of(self, layer: int, state: Mapping[str, Tensor]) -> Tensor:
        """An expert's tensors by name, as they are in a checkpoint, packed."""
        stacked = Belongings.of(self.layers[layer], None).stacked
        for name, stack in stacked.items():
            if name not in state or state[name].shape != stack.shape[1:]:
                shape = list(state[name].shape) if name in state else "nothing"
                raise ValueError(f"{name} of an expert of layer {layer} is {shape}; expected {list(stack.shape[1:])}")
        lines = {name: state[name].to(stack)[None] for name, stack in stacked.items()}
        return packed(lines, 0, Belongings.of(self.layers[layer], None).expert_bytes)

    @torch.no_grad()
    def restack(self, layer: int, ids: Sequence[int], arrived: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The layer's stacks for other experts: those here, and those that arrived, packed."""
        held, belongings = self._now(layer)
        slot_of = {expert: slot for slot, expert in enumerate(held)}
        return dict(restacked(belongings.stacked, slot_of, arrived, ids))

    def take(self, layer: int, ids: Sequence[int], weights: Mapping[str, Tensor]) -> None:
        """Between two steps: the new stacks are the layer's own from now on, the old ones are gone."""
        with self._whole:
            self.layers[layer].experts.rehouse(ids, weights)

    def _now(self, layer: int) -> tuple[tuple[int, ...], Belongings]:
        with self._whole:
            return self.layers[layer].experts.expert_ids, Belongings.of(self.layers[layer], None)

    def drop(self) -> None:
        """Hold nothing, as who stands by."""
        for layer, held in enumerate(self.held_L):
            if held:
                self.take(layer, (), self.restack(layer, (), {}))


class _Offer(NamedTuple):
    layer: int
    ids: tuple[int, ...]
    weights: dict[str, Tensor]


class AbandonedError(RuntimeError):
    """What a thread did is not wanted any more."""


class Handover:
    """Stacks made in the background, taken over between two steps, one layer after the other: so no more than one
    layer's is there twice. notify: called when there is something to take."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify, self._offer = notify, None
        self._changed, self.abandoned = threading.Condition(), False

    _offer: _Offer | None

    @property
    def waiting(self) -> bool:
        return self._offer is not None

    def offer(self, layer: int, ids: Sequence[int], weights: dict[str, Tensor]) -> None:
        """Returns once it is taken."""
        with self._changed:
            self._offer = _Offer(layer, tuple(ids), weights)
            self._notify()
            self._changed.wait_for(lambda: self._offer is None or self.abandoned)
            if self.abandoned:
                raise AbandonedError

    def take(self, stock: Stock) -> None:
        """What is offered, if anything."""
        with self._changed:
            if self._offer is not None and not self.abandoned:
                stock.take(*self._offer)
                self._offer = None
                self._changed.notify_all()

    def abandon(self) -> None:
        with self._changed:
            self.abandoned, self._offer = True, None
            self._changed.notify_all()
