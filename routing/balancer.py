"""Balancers: rules for prices. A token chooses the top-k of `score - price`; its weights ignore the price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Balancer(Protocol):
    def quote(self, score_TE: Tensor, price_E: Tensor, top_k: int) -> Tensor:
        """The prices of this batch, from its scores and the layer's standing prices. Reads only."""


@dataclass(frozen=True, kw_only=True)
class Unpriced:
    """No balancing: every expert costs what it always did, which is nothing unless a checkpoint says otherwise."""

    def quote(self, score_TE: Tensor, price_E: Tensor, top_k: int) -> Tensor:
        return price_E
