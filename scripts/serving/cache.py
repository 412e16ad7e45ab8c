"""Cache: the keys and values of what was read so far, a slot for each sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spots(NamedTuple):
    """Where each token of a step belongs: the slot of its sequence, and its place in it."""

    slot_T: Tensor
    place_T: Tensor

    def of(self, which: Tensor) -> Spots:
        return Spots(self.slot_T[which], self.place_T[which])


class Past(NamedTuple):
    """One layer's part of a cache. key, value: [slots, places, dim], heads side by side."""

    key: Tensor
    value: Tensor

    def write(self, key_TD: Tensor, value_TD: Tensor, spots: Spots) -> None:
        """Written twice, a place holds what was written last: a step that failed half-way can be taken again."""
        self.key[spots] = key_TD
        self.value[spots] = value_TD

    def read(self, spots: Spots) -> tuple[Tensor, Tensor, Tensor]:
        """-> keys and values [T, places, dim], and seen [T, places]: each token sees its own place and those before.

        What lies beyond, from a sequence that had the slot before or a step that failed, nobody sees. All places are
        read whatever the step holds, so that a token's sums do not depend on who shares its step.
        """
        place_P = torch.arange(self.key.shape[1], device=self.key.device)
        return self.key[spots.slot_T], self.value[spots.slot_T], place_P <= spots.place_T[:, None]


class Cache:
    """layers: a Past for each."""

    def __init__(self, layers: int, slots: int, places: int, dim: int, like: Tensor) -> None:
        self.slots, self.places = slots, places
        self.layers = tuple(
            Past(like.new_zeros(slots, places, dim), like.new_zeros(slots, places, dim)) for _ in range(layers)
        )

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for past in self.layers for part in past)
