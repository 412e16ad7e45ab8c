"""Selectors: from scores and prices to rows. They choose and do not weigh, so nothing here has a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

from routing.top_k import best_experts


class Rows(NamedTuple):
    """Which token goes to which expert. top_k: as in Choice. wanted_N: expert_N before any was dropped; None: it is."""

    token_N: Tensor
    expert_N: Tensor
    top_k: int | None
    wanted_N: Tensor | None = None


class Tokens(NamedTuple):
    """What is known of a batch of tokens besides what they say.

    valid_T: False for padding, None if there is none. length: they are sequences of so many, end to end. ratio_B: the
    masked share of each sequence (of a diffusion model), None if nobody said.
    """

    valid_T: Tensor | None
    length: int
    ratio_B: Tensor | None = None


def check_tokens(tokens: Tokens, num_tokens: int) -> None:
    """Raise ValueError unless it tells of so many tokens. Reads shapes, never values."""
    valid_T, length, ratio_B = tokens
    if valid_T is not None and (valid_T.dtype != torch.bool or valid_T.shape != (num_tokens,)):
        raise ValueError(f"valid_T must be bool and {[num_tokens]}; got {valid_T.dtype} and {list(valid_T.shape)}")
    if not num_tokens:
        return
    if length < 1 or num_tokens % length:
        raise ValueError(f"{num_tokens} tokens are no whole sequences of length={length}")
    shape = (num_tokens // length,)
    if ratio_B is not None and (not ratio_B.is_floating_point() or ratio_B.shape != shape):
        raise ValueError(
            f"ratio_B must be floating point and {list(shape)}, one for each sequence of {length} tokens; "
            f"got {ratio_B.dtype} and {list(ratio_B.shape)}"
        )


class Select(Protocol):
    def __call__(self, score_TE: Tensor, price_E: Tensor, top_k: int, tokens: Tokens) -> Rows:
        """By score less price. -> rows; those of padding need not be told: the Router will."""

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError if this selector cannot choose top_k of num_experts."""


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Each token takes its top_k best experts. Among equals, whichever torch.topk prefers on that device.

    groups > 1 limits a token to the experts of its `keep` best groups, a group being num_experts / groups neighbours. A
    group is worth its best expert ("max") or its two best together ("top2sum").

    fused: prices and top-k in one Triton kernel, fp32 on GPUs from Ampere on where Triton is, which takes the lowest of
    equals. No GPU has run it yet.
    """

    groups: int = 1
    keep: int = 1
    worth: Literal["max", "top2sum"] = "max"
    fused: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.groups:
            raise ValueError(f"TopK keeps {self.keep} of {self.groups} groups; use 1 <= keep <= groups")
        if self.worth not in ("max", "top2sum"):
            raise ValueError(f"TopK cannot value a group by {self.worth!r}; use 'max' or 'top2sum'")

    def check(self, num_experts: int, top_k: int) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of {num_experts} experts; use 1 <= top_k <= num_experts")
        if num_experts % self.groups:
            raise ValueError(f"{num_experts} experts do not divide into {self.groups} groups")
        if top_k > (reach := self.keep * num_experts // self.groups):
            raise ValueError(f"top_k={top_k}, but {self.keep} of {self.groups} groups hold only {reach} experts")

    def __call__(self, score_TE: Tensor, price_E: Tensor, top_k: int, tokens: Tokens) -> Rows:
        if self.keep < self.groups:
            score_TE = self._keep_best_groups(score_TE, price_E)
        return token_major(best_experts(score_TE, price_E, top_k, self.fused))

    def _keep_best_groups(self, score_TE: Tensor, price_E: Tensor) -> Tensor:
        """-inf outside the best groups. (Zero could win against what others score less their prices.)"""
        priced_TGE = rearrange(score_TE - price_E, "t (g e) -> t g e", g=self.groups)
        best = min(2 if self.worth == "top2sum" else 1, priced_TGE.shape[-1])
        worth_TG = priced_TGE.topk(best, dim=-1).values.sum(dim=-1)
        out_TG = torch.ones_like(worth_TG, dtype=torch.bool)
        out_TG.scatter_(1, worth_TG.topk(self.keep, dim=-1).indices, False)
        out_TE = repeat(out_TG, "t g -> t (g e)", e=priced_TGE.shape[-1])
        return score_TE.masked_fill(out_TE, float("-inf"))


def token_major(expert_TK: Tensor) -> Rows:
    """expert_TK as rows, K for each token, in token order."""
    num_tokens, top_k = expert_TK.shape
    token_T1 = torch.arange(num_tokens, device=expert_TK.device)[:, None]
    return Rows(token_T1.expand(-1, top_k).reshape(-1), expert_TK.reshape(-1), top_k)
