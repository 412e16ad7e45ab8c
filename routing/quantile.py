"""Quantile: prices at a quantile of the scores, less what each token's own choice costs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.balancer import Balancer
from routing.choice import Choice
from routing.dual import Ends, check_top_k, or_standing
from routing.histogram import Histogram
from routing.interior import optimize
from routing.margins import Margins


@dataclass(frozen=True, kw_only=True)
class Quantile(Balancer):
    """Each expert's price is what C of its tokens would pay at most, the tokens' prices held; and so in turn.

    Both are taken in the middle of what is best for them. The usual rule takes the lower ends, and where tokens are few
    it comes to rest at prices that are not best: see EdgeQuantile.

    A batch is quoted the standing prices after `rounds` rounds on its own scores; 0 quotes the standing prices, and no
    token's choice depends on others of the step. The standing prices go one round further with every step, on all of
    its tokens together: from histograms of `bins` bins that reach so far from the standing price, in units of the
    scores. They are whole counts, so the prices are the same to the bit however the tokens were spread.

    polish: so many steps of an interior-point method after the rounds; a dozen find the best prices of the batch.
    """

    rounds: int = 1
    bins: int = 256
    reach: float = 2.0
    polish: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"{type(self).__name__}(rounds={self.rounds}): use rounds >= 0")
        if self.polish < 0:
            raise ValueError(f"{type(self).__name__}(polish={self.polish}): use polish >= 0")
        _ = self.histogram

    @property
    def histogram(self) -> Histogram:
        return Histogram(bins=self.bins, reach=self.reach)

    def pick(self, ends: Ends) -> Tensor:
        return ends.middle

    def check(self, num_experts: int, top_k: int) -> None:
        check_top_k(num_experts, top_k)

    def shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        return {"margin_EB": (num_experts, self.bins)}

    def quote(
        self, score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None, settled: Tensor
    ) -> Tensor:
        num_tokens, num_experts = score_TE.shape
        if self.rounds + self.polish == 0 or top_k == num_experts or num_tokens == 0:
            return price_E
        score_TE = score_TE.detach()
        margins, quoted_E = Margins(score_TE, top_k, valid_T), price_E.to(score_TE.dtype)
        for _ in range(self.rounds):
            quoted_E = self.pick(margins.expert_ends(self.pick(margins.token_ends(quoted_E))))
            quoted_E = quoted_E - quoted_E.mean()
        if self.polish:
            quoted_E = optimize(score_TE, quoted_E, top_k, self.polish, valid_T).price_E
            quoted_E = (quoted_E - quoted_E.mean()).to(score_TE.dtype)
        return or_standing(quoted_E, price_E, valid_T)

    def observe(self, choice: Choice, price_E: Tensor) -> dict[str, Tensor]:
        score_TE = choice.score_TE.detach()
        token_price_T = self.pick(Margins(score_TE, choice.k).token_ends(price_E.to(score_TE.dtype)))
        return {"margin_EB": self.histogram.count(score_TE - token_price_T[:, None], price_E, choice.valid_T)}

    def settle(self, price_E: Tensor, stats: Mapping[str, Tensor], top_k: int, *, settled: Tensor) -> Tensor:
        num_experts = len(price_E)
        if top_k == num_experts:
            return price_E
        ends = self.histogram.ends(stats["margin_EB"], stats["tokens"] * top_k / num_experts)
        moved_E = price_E.double() + self.pick(ends)
        moved_E = (moved_E - moved_E.mean()).to(price_E.dtype)
        return torch.where(stats["tokens"] > 0, moved_E, price_E)


@dataclass(frozen=True, kw_only=True)
class EdgeQuantile(Quantile):
    """Quantile balancing as it is usually done, with the lower ends: the (K+1)-th and the (C+1)-th largest."""

    def pick(self, ends: Ends) -> Tensor:
        return ends.lower.contiguous()  # or its mean would round as its layout has it
