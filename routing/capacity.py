"""Capacity: how many rows an expert takes from one rank's batch, and which of the others are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from routing.select import Rows


class Drop(Protocol):
    def luck(self, score_TE: Tensor) -> Tensor | None:
        """What it draws by lot for a batch, the same again when the batch is recomputed. -> luck_TE, or None"""
        return None

    def __call__(self, rows: Rows, score_TE: Tensor, luck_TE: Tensor | None) -> Rows:
        """The rows with some of them sent nowhere. Those of padding already are, and take no room."""


@dataclass(frozen=True, kw_only=True)
class Dropless(Drop):
    """Every row is computed, however many there are."""

    def __call__(self, rows: Rows, score_TE: Tensor, luck_TE: Tensor | None) -> Rows:
        return rows
