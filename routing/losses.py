"""Balancing losses, token by token: what each token pays for its scores.

All but ZLoss are one formula, coefficient * E * sum over experts of f * P: f is the share of rows that wanted an
expert, a constant to the gradient; P the mean of the tokens' scores, each token's made to sum to 1. As a mean over
tokens, that is a price f on every expert. So these return the cost of each token, and whoever averages the model's own
loss over tokens averages this one alike: its gradient then is the same however tokens are spread over ranks and
micro-batches. The losses differ in whose rows f counts. Uniform shares and scores cost the coefficient, for every k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

from routing.choice import NOWHERE, Choice


class Loss(Protocol):
    pooled: ClassVar[bool] = False
    """Whether it wants pool_E."""

    def __call__(self, choice: Choice, pool_E: Tensor | None) -> Tensor:
        """pool_E: rows for each expert over more than this batch, for `pooled` losses. -> cost_T, 0 at padding"""


@dataclass(frozen=True, kw_only=True)
class _Coefficient:
    coefficient: float

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < float("inf"):
            raise ValueError(f"{type(self).__name__} has coefficient={self.coefficient}; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class SwitchLoss(_Coefficient, Loss):
    """f of this rank's micro-batch: the smaller the batch, the stricter."""

    def __call__(self, choice: Choice, pool_E: Tensor | None) -> Tensor:
        return self.coefficient * _tax(choice, _shares(choice.wanted_E, choice))


@dataclass(frozen=True, kw_only=True)
class GShardLoss(_Coefficient, Loss):
    """f of the first choices of this rank's micro-batch alone. It takes a choice of k experts for each token."""

    def __call__(self, choice: Choice, pool_E: Tensor | None) -> Tensor:
        if choice.top_k is None:
            raise ValueError("GShardLoss counts first choices; this selector has none: use SwitchLoss")
        first_T = rearrange(choice.wanted_N, "(t k) -> t k", k=choice.top_k)[:, 0]
        return self.coefficient * _tax(choice, _shares(_count(first_T[None], choice)[0], choice))


@dataclass(frozen=True, kw_only=True)
class SequenceLoss(_Coefficient, Loss):
    """f of each sequence, of what it would choose without prices. Sequences must lie on one rank whole."""

    def __call__(self, choice: Choice, pool_E: Tensor | None) -> Tensor:
        expert_TK = choice.score_TE.detach().topk(choice.k, dim=-1).indices
        if choice.valid_T is not None:
            expert_TK = expert_TK.where(choice.valid_T[:, None], NOWHERE)
        length = max(choice.length, 1)
        share_BE = _shares(_count(rearrange(expert_TK, "(b s) k -> b (s k)", s=length), choice), choice)
        return self.coefficient * _tax(choice, repeat(share_BE, "b e -> (b s) e", s=length))


@dataclass(frozen=True, kw_only=True)
class GlobalLoss(_Coefficient, Loss):
    """f of the whole step: what all ranks of the layer's group chose in its micro-batches so far, this one included.

    With `census` before the step it is what all of them will choose, and the loss is exactly that of one big batch.
    Rows that were dropped are not in it.
    """

    pooled: ClassVar[bool] = True

    def __call__(self, choice: Choice, pool_E: Tensor | None) -> Tensor:
        if pool_E is None:
            raise ValueError("GlobalLoss needs the loads of the whole step; give it to a MoE layer, or hand it pool_E")
        return self.coefficient * _tax(choice, _shares(pool_E, choice))


@dataclass(frozen=True, kw_only=True)
class ZLoss(_Coefficient, Loss):
    """Large logits cost: the square of their logsumexp."""

    def __call__(self, choice: Choice, pool_E: Tensor | None) -> Tensor:
        return self.coefficient * _without_padding(choice.logit_TE.logsumexp(dim=-1).square(), choice)


def _tax(choice: Choice, share: Tensor) -> Tensor:
    """What each token's scores, over their sum, cost at these shares, [E] or [T, E]. -> cost_T

    Not as a matrix product: autocast would compute that in bf16.
    """
    score_TE = choice.score_TE / (choice.score_TE.sum(dim=-1, keepdim=True) + 1e-20)
    return _without_padding((score_TE * share).sum(dim=-1), choice)


def _shares(load_E: Tensor, choice: Choice) -> Tensor:
    """E times the share of each expert; without rows, nothing costs anything."""
    load_E = load_E.to(choice.score_TE.dtype)
    return load_E * choice.num_experts / load_E.sum(dim=-1, keepdim=True).clamp(min=1)


def _count(expert_BN: Tensor, choice: Choice) -> Tensor:
    """Rows for each expert, line by line."""
    load_BE = expert_BN.new_zeros(len(expert_BN), choice.num_experts + 1)
    return load_BE.scatter_add_(1, expert_BN + 1, torch.ones_like(expert_BN))[:, 1:]


def _without_padding(cost_T: Tensor, choice: Choice) -> Tensor:
    return cost_T if choice.valid_T is None else cost_T.where(choice.valid_T, 0.0)
