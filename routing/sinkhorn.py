"""Sinkhorn: the dual made smooth by entropy, a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routing.dual import check_top_k, or_standing
from routing.mean_of_quotes import MeanOfQuotes


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(MeanOfQuotes):
    """As Bip, with soft maxima: a token wants all experts a little, the best ones more the lower the temperature.

    In units of the scores. After enough rounds what tokens want is balanced exactly, but what they take is their top-k.
    For K = 1 the two agree ever better as the temperature falls. For larger K nothing says that a token may want an
    expert only once: at a low temperature it wants its best one K times over, and the choice is badly balanced.
    """

    temperature: float = 0.2
    rounds: int = 8

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"Sinkhorn(temperature={self.temperature}): use temperature > 0")
        if self.rounds < 0:
            raise ValueError(f"Sinkhorn(rounds={self.rounds}): use rounds >= 0")

    def check(self, num_experts: int, top_k: int) -> None:
        check_top_k(num_experts, top_k)

    def shift(self, price_E: Tensor) -> Tensor:
        return price_E - price_E.mean()

    def quote(
        self, score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None, settled: Tensor
    ) -> Tensor:
        num_tokens, num_experts = score_TE.shape
        if top_k == num_experts or num_tokens == 0:
            return price_E
        heat_TE = score_TE.detach() / self.temperature
        quoted_E = price_E.to(heat_TE.dtype) / self.temperature
        for _ in range(self.rounds):  # K and C would only shift all prices
            margin_TE = heat_TE - (heat_TE - quoted_E).logsumexp(dim=1, keepdim=True)
            if valid_T is not None:
                margin_TE = margin_TE.masked_fill(~valid_T[:, None], float("-inf"))
            quoted_E = margin_TE.logsumexp(dim=0)
        return or_standing(self.shift(quoted_E * self.temperature), price_E, valid_T)
