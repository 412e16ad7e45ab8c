"""Balancers: rules for prices. A token chooses the top-k of `score - price`; its weights ignore the price.

A balancer is a value and keeps no state: the Router holds the standing prices and the statistics, as buffers.

    quote     before a choice: the prices of this batch, from its scores and the standing prices
    observe   after it: what this batch adds to the statistics. They are sums, so a step's statistics are the same
              however its tokens are spread over micro-batches and ranks
    settle    once per optimiser step: new standing prices from the step's statistics, summed over all of that
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from routing.choice import Choice


class Balancer(Protocol):
    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError if this balancer cannot serve such a layer."""

    def shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """The statistics it observes besides those of every Router (see `settle`), by name."""
        return {}

    def quote(
        self, score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None, settled: Tensor
    ) -> Tensor:
        """The prices of this batch. Reads only. -> quoted_E, fp32 or better

        score_TE: of padding too, which valid_T tells. price_E: the standing prices. settled: how often they have been
        settled, 0 at first.
        """
        return price_E

    def observe(self, choice: Choice, price_E: Tensor) -> dict[str, Tensor]:
        """What this batch adds to each of its own statistics. price_E: the standing prices, not those quoted."""
        return {}

    def settle(self, price_E: Tensor, stats: Mapping[str, Tensor], top_k: int, *, settled: Tensor) -> Tensor:
        """New standing prices. stats: float64 sums of a whole step over all ranks; those of `shapes`, and

        load_E   rows that wanted each expert, before any were dropped
        kept_E   rows that were not dropped
        score_E  scores of the tokens, each token's made to sum to 1
        tokens   tokens, without padding

        A step without tokens must leave the prices alone. No rank may read a value on its host to find that out.
        """
        return price_E


@dataclass(frozen=True, kw_only=True)
class Unpriced(Balancer):
    """No balancing: every expert costs what it always did, which is nothing unless a checkpoint says otherwise."""

    def check(self, num_experts: int, top_k: int) -> None:
        pass
