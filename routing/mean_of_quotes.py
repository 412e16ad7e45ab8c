"""MeanOfQuotes: balancers that find prices for each batch, and stand on the mean of a step's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from routing.balancer import Balancer
from routing.choice import Choice


class MeanOfQuotes(Balancer):
    """Quotes start from the standing prices: the mean of all quotes of the step before, each token counting once.

    A mean of quotes depends on how a step's tokens were spread over ranks and micro-batches, as the quotes do.
    """

    def shift(self, price_E: Tensor) -> Tensor:
        """All prices by one amount, to where they belong. That changes no choice of a top-k."""
        return price_E

    def shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        return {"quoted_E": (num_experts,)}

    def observe(self, choice: Choice, price_E: Tensor) -> dict[str, Tensor]:
        return {"quoted_E": choice.price_E.double() * choice.tokens}

    def settle(self, price_E: Tensor, stats: Mapping[str, Tensor], top_k: int, *, settled: Tensor) -> Tensor:
        mean_E = self.shift(stats["quoted_E"] / stats["tokens"].clamp(min=1))
        return torch.where(stats["tokens"] > 0, mean_E.to(price_E.dtype), price_E)
