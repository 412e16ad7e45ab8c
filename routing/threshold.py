"""Threshold: a token takes every expert whose score exceeds that expert's price."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routing.choice import NOWHERE
from routing.select import Rows, Tokens, token_major


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Each token takes the experts whose score is above their price, its `most` best of them where they are more.

    The price is a cutoff, to be set by a balancer that sees to top_k experts a token on average. What a token takes
    depends on no other token. Rows are `most` for each token, in token order, best first; those not above go nowhere.
    """

    most: int

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"Threshold takes most={self.most} experts; use at least 1")

    def check(self, num_experts: int, top_k: int) -> None:
        if not 1 <= top_k <= self.most <= num_experts:
            raise ValueError(
                f"top_k={top_k} on average and at most {self.most} of {num_experts} experts; "
                f"use 1 <= top_k <= most <= num_experts"
            )

    def __call__(self, score_TE: Tensor, price_E: Tensor, top_k: int, tokens: Tokens) -> Rows:
        best_TK = (score_TE - price_E).topk(self.most, dim=-1)
        return token_major(best_TK.indices.where(best_TK.values > 0, NOWHERE))
