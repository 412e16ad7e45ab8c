"""Capacity: how many rows an expert takes from one rank's batch, and which of the others are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import torch
from torch import Tensor

from routing.choice import NOWHERE
from routing.select import Rows, Tokens


class Drop(Protocol):
    def luck(self, score_TE: Tensor) -> Tensor | None:
        """What it draws by lot for a batch, the same again when the batch is recomputed. -> luck_TE, or None"""
        return None

    def __call__(self, rows: Rows, score_TE: Tensor, luck_TE: Tensor | None, top_k: int, tokens: Tokens) -> Rows:
        """The rows with some of them sent nowhere. Those of padding already are, and take no room."""


@dataclass(frozen=True, kw_only=True)
class Dropless(Drop):
    """Every row is computed, however many there are."""

    def __call__(self, rows: Rows, score_TE: Tensor, luck_TE: Tensor | None, top_k: int, tokens: Tokens) -> Rows:
        return rows


@dataclass(frozen=True, kw_only=True)
class Capacity(Drop):
    """An expert takes at most ceil(factor * k * n / E) rows of a rank's batch, n being its tokens without padding.

    It keeps those with the highest "score", prices apart, those of the first tokens by "position", or some at "random";
    among equals, those of the first tokens. It drops in training and evaluation alike. The factor has six decimals.
    """

    factor: float
    drop: Literal["score", "position", "random"] = "score"

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1e4:
            raise ValueError(f"Capacity(factor={self.factor}): use more than 0, such as 1.25; Dropless() drops nothing")
        if self.drop not in ("score", "position", "random"):
            raise ValueError(f"Capacity cannot drop by {self.drop!r}; use 'score', 'position' or 'random'")

    def luck(self, score_TE: Tensor) -> Tensor | None:
        return torch.rand_like(score_TE) if self.drop == "random" else None

    def __call__(self, rows: Rows, score_TE: Tensor, luck_TE: Tensor | None, top_k: int, tokens: Tokens) -> Rows:
        num_tokens, num_experts = score_TE.shape
        real = num_tokens if tokens.valid_T is None else tokens.valid_T.sum()
        worth_TE = luck_TE if self.drop == "random" else score_TE if self.drop == "score" else None
        place_N = _place(rows, worth_TE, num_experts)
        kept_N = rows.expert_N.where(place_N < self.bound(real * top_k, num_experts), NOWHERE)
        return rows._replace(expert_N=kept_N, wanted_N=rows.expert_N)

    def bound(self, rows: Tensor | int, num_experts: int) -> Tensor | int:
        """In whole numbers: 1.1 * 10 must not round up to 12."""
        factor = Fraction(self.factor).limit_denominator(10**6)
        bound = -(-(rows * factor.numerator) // (num_experts * factor.denominator))
        return bound.clamp(min=1) if isinstance(bound, Tensor) else max(bound, 1)


def _place(rows: Rows, worth_TE: Tensor | None, num_experts: int) -> Tensor:
    """Each row's place in the line before its expert: by worth, then by token. -> place_N, from 0"""
    by_token_N = torch.arange(len(rows.token_N), device=rows.token_N.device)
    order_N = by_token_N if rows.top_k is not None else rows.token_N.argsort(stable=True)
    if worth_TE is not None:
        worth_N = worth_TE[rows.token_N, rows.expert_N.clamp(min=0)]
        order_N = order_N[worth_N[order_N].argsort(descending=True, stable=True)]
    order_N = order_N[rows.expert_N[order_N].argsort(stable=True)]
    line_N = rows.expert_N[order_N] + 1  # rows that go nowhere stand in a line of their own
    length_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=line_N.device)
    length_E.scatter_add_(0, line_N, torch.ones_like(line_N))
    first_E = length_E.cumsum(dim=0) - length_E
    place_N = torch.arange(len(line_N), device=line_N.device) - first_E[line_N]
    return torch.empty_like(place_N).scatter_(0, order_N, place_N)
