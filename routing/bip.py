"""Bip: prices that balance this very batch, by a few rounds of the dual's own iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from routing.dual import check_top_k, or_standing
from routing.margins import Margins
from routing.mean_of_quotes import MeanOfQuotes


@dataclass(frozen=True, kw_only=True)
class Bip(MeanOfQuotes):
    """Binary integer programming balancing: the tokens' prices and the experts' in turn, each at its lower end.

    Neither falls below 0, as if balance asked for at most K experts a token and at most C tokens an expert. The prices
    of a batch depend on all of its tokens: not for a model whose tokens must not know of later ones.

    gauge: "min" starts every batch with the cheapest expert at 0. With "none" prices that start from those of the batch
    before can only rise: ever more tokens find all scores below the prices, and the balance gets worse.
    """

    rounds: int = 4
    gauge: Literal["min", "none"] = "min"

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"Bip(rounds={self.rounds}): use rounds >= 0")
        if self.gauge not in ("min", "none"):
            raise ValueError(f"Bip knows no gauge {self.gauge!r}; use 'min' or 'none'")

    def check(self, num_experts: int, top_k: int) -> None:
        check_top_k(num_experts, top_k)

    def shift(self, price_E: Tensor) -> Tensor:
        return price_E - price_E.min() if self.gauge == "min" else price_E

    def quote(
        self, score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None, settled: Tensor
    ) -> Tensor:
        num_tokens, num_experts = score_TE.shape
        if top_k == num_experts or num_tokens == 0:
            return price_E
        margins, quoted_E = Margins(score_TE, top_k, valid_T), self.shift(price_E.to(score_TE.dtype))
        for _ in range(self.rounds):
            quoted_E = margins.expert_lower(margins.token_lower(quoted_E).clamp(min=0), floor=0)
        return or_standing(quoted_E, price_E, valid_T)
