"""Weigh: from the scores of the chosen experts to the weights of their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from routing.choice import NOWHERE
from routing.select import Rows


@dataclass(frozen=True, kw_only=True)
class Weigh:
    """A chosen expert's score, over their sum or not, then scaled. Prices have no part in it.

    normalize: divide by the sum of the token's scores. over: of the experts it "kept", so that its weights sum to the
    scale whatever was dropped, or of those it "wanted", so that what is dropped is missing.
    """

    normalize: bool = False
    scale: float = 1.0
    over: Literal["kept", "wanted"] = "kept"

    def __post_init__(self) -> None:
        if self.over not in ("kept", "wanted"):
            raise ValueError(f"Weigh cannot normalise over {self.over!r}; use 'kept' or 'wanted'")

    def __call__(self, score_TE: Tensor, rows: Rows) -> Tensor:
        wanted_N = rows.expert_N if rows.wanted_N is None or self.over == "kept" else rows.wanted_N
        score_N = _scores_of(score_TE, rows.token_N, wanted_N.clamp(min=0), rows.top_k).where(wanted_N != NOWHERE, 0.0)
        if self.normalize:
            score_N = score_N / (_sum_over_tokens(score_N, rows, score_TE.shape[0])[rows.token_N] + 1e-20)
        if wanted_N is not rows.expert_N:
            score_N = score_N.where(rows.expert_N != NOWHERE, 0.0)
        return score_N * self.scale if self.scale != 1.0 else score_N


def _scores_of(score_TE: Tensor, token_N: Tensor, expert_N: Tensor, top_k: int | None) -> Tensor:
    """Where every token has as many, no row says which token it is of: backward is several times faster so."""
    if top_k is None:
        return score_TE[token_N, expert_N]
    return score_TE.gather(1, expert_N.view(-1, top_k)).flatten()


def _sum_over_tokens(value_N: Tensor, rows: Rows, num_tokens: int) -> Tensor:
    if rows.top_k is not None:
        return value_N.view(num_tokens, rows.top_k).sum(dim=-1)
    return value_N.new_zeros(num_tokens).index_add(0, rows.token_N, value_N)
