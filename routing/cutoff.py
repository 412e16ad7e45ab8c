"""Cutoff: for routing by threshold, the score that a share K / E of all tokens exceeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.balancer import Balancer
from routing.choice import Choice
from routing.dual import check_top_k, or_standing
from routing.histogram import Histogram
from routing.margins import Margins


@dataclass(frozen=True, kw_only=True)
class Cutoff(Balancer):
    """Each expert's price is the (1 - K/E) quantile of its scores, averaged over steps.

    A token that takes every expert whose score exceeds its price then takes K on average, an expert C of T tokens. A
    step's quantile is of all of its tokens, from histograms of `bins` bins that reach so far from the standing price,
    in units of the scores, so it is the same to the bit however the tokens were spread. decay: how much of the standing
    price a step leaves. Until the first settling there is none, and a batch is quoted its own quantile.
    """

    decay: float = 0.9
    bins: int = 256
    reach: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"Cutoff(decay={self.decay}): use 0 <= decay < 1")
        _ = self.histogram

    @property
    def histogram(self) -> Histogram:
        return Histogram(bins=self.bins, reach=self.reach)

    def check(self, num_experts: int, top_k: int) -> None:
        check_top_k(num_experts, top_k)

    def shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        return {"score_EB": (num_experts, self.bins)}

    def quote(
        self, score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None, settled: Tensor
    ) -> Tensor:
        num_tokens, num_experts = score_TE.shape
        if top_k == num_experts or num_tokens == 0:
            return price_E
        own_E = Margins(score_TE, top_k, valid_T).expert_ends(score_TE.new_zeros(num_tokens)).middle
        return or_standing(torch.where(settled > 0, price_E, own_E), price_E, valid_T)

    def observe(self, choice: Choice, price_E: Tensor) -> dict[str, Tensor]:
        return {"score_EB": self.histogram.count(choice.score_TE.detach(), price_E, choice.valid_T)}

    def settle(self, price_E: Tensor, stats: Mapping[str, Tensor], top_k: int, *, settled: Tensor) -> Tensor:
        num_experts = len(price_E)
        if top_k == num_experts:
            return price_E
        ends = self.histogram.ends(stats["score_EB"], stats["tokens"] * top_k / num_experts)
        share = torch.where(settled > 0, 1 - self.decay, 1.0)
        moved_E = (price_E.double() + share * ends.middle).to(price_E.dtype)
        return torch.where(stats["tokens"] > 0, moved_E, price_E)
