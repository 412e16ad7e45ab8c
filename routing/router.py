"""Router: x -> Choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from routing.balancer import Balancer, Unpriced
from routing.choice import NOWHERE, Choice
from routing.scores import Score, Softmax, at_least_fp32
from routing.select import Rows, Select, TopK, token_major


@dataclass(frozen=True, kw_only=True)
class Weigh:
    """From the scores of the chosen experts to the weights of their results: over their sum or not, then scaled."""

    normalize: bool = False
    scale: float = 1.0

    def __call__(self, score_TE: Tensor, rows: Rows) -> Tensor:
        score_N = score_TE[rows.token_N, rows.expert_N.clamp(min=0)]
        score_N = score_N.where(rows.expert_N != NOWHERE, 0.0)
        if self.normalize:
            score_N = score_N / (_sum_over_tokens(score_N, rows, score_TE.shape[0])[rows.token_N] + 1e-20)
        return score_N * self.scale if self.scale != 1.0 else score_N


class Router(nn.Module):
    """x_TD -> Choice: score every expert, let the balancer quote prices, choose by score less price, weigh by score.

    The logits are computed in fp32 or better whatever the type of x, outside autocast. price_E stays fp32 too, under
    `.bfloat16()` and friends, and travels in the state dict.
    """

    price_E: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Score = Softmax(),
        select: Select = TopK(),
        weigh: Weigh = Weigh(),
        balancer: Balancer = Unpriced(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        select.check(num_experts, top_k)
        self.top_k, self.score, self.select, self.weigh, self.balancer = top_k, score, select, weigh, balancer
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.register_buffer("price_E", torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.price_E)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, rows: Rows | None = None) -> Choice:
        """valid_T: False for padding, which goes nowhere. rows: choose these again instead of deciding anew."""
        if valid_T is not None:  # whatever padding holds, NaN included, must not reach a gradient
            x_TD = x_TD.where(valid_T[:, None], 0.0)
        logit_TE = self.logits(x_TD)
        score_TE = self.score(logit_TE)
        if rows is None:
            rows = self.choose(score_TE.detach(), valid_T)
        elif torch._C._len_torch_dispatch_stack():
            # Selective checkpointing hands out saved results in the order of the calls: a top-k that it saved must be
            # called again, though its answer is known, or the next caller would get it.
            self.choose(score_TE.detach(), valid_T)
        return Choice(
            token_N=rows.token_N,
            expert_N=rows.expert_N,
            weight_N=self.weigh(score_TE, rows),
            score_TE=score_TE,
            logit_TE=logit_TE,
            valid_T=valid_T,
            top_k=rows.top_k,
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        dtype = at_least_fp32(x_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    @torch.no_grad()
    def choose(self, score_TE: Tensor, valid_T: Tensor | None) -> Rows:
        price_E = self.balancer.quote(score_TE, self.price_E, self.top_k)
        return _without_padding(self.select(score_TE - price_E, self.top_k), valid_T)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the prices with the module, but never change their type: a bf16 price stops moving at 0.5."""
        price_E = self.price_E
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.price_E.dtype != torch.float32:
            self.price_E = price_E.to(self.price_E.device)
        return module  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"{dim} -> {self.top_k} of {num_experts}, {self.score}, {self.select}, {self.weigh}, {self.balancer}"


class ForcedRouter(Router):
    """Balance by force: the rows of every batch fall evenly on the ranks, whatever the scores say.

    An honest upper bound for any balancer: the scores are computed and weigh the results, only the choice is forced.
    Rows of different ranks differ by at most one, or as little as K distinct experts a token allow where some ranks
    home fewer than others. The rows that a batch has left over are dealt on from where `source` batches before it
    ended: several ranks forcing batches of one size, `source` being their own rank, are even together too. Padding is
    dealt rows like any token before it is left out, so with much of it the rest need not be even.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, home_E: Any, source: int = 0, **options: Any) -> None:
        """home_E: the rank of each expert, as in Placement.home_E. options: as for Router."""
        super().__init__(dim, num_experts, top_k, **options)
        self.home_E: NDArray[np.int64] = np.asarray(home_E, dtype=np.int64)
        self.source = source
        if self.home_E.shape != (num_experts,) or self.home_E.min() < 0:
            raise ValueError(f"home_E needs one rank for each of {num_experts} experts; got {self.home_E.tolist()}")

    def choose(self, score_TE: Tensor, valid_T: Tensor | None) -> Rows:
        table_TK = forced_experts(score_TE.shape[0], self.top_k, self.home_E, source=self.source)
        expert_TK = torch.from_numpy(table_TK).to(score_TE.device, non_blocking=True)
        return _without_padding(token_major(expert_TK), valid_T)


def forced_experts(num_tokens: int, top_k: int, home_E: NDArray[np.int64], *, source: int = 0) -> NDArray[np.int64]:
    """K distinct experts for each token, with the rows of the ranks as even as can be. -> expert_TK

    Each rank gets a share of the T*K rows, at most T for each expert it homes. The shares, laid end to end, are dealt
    to the tokens in turn: no token gets more than ceil(share / T) rows of a rank, so its experts can be distinct.
    """
    share_R = _shares(num_tokens, top_k, np.bincount(home_E), source + 1) - _shares(
        num_tokens, top_k, np.bincount(home_E), source
    )
    expert_N = np.empty(num_tokens * top_k, dtype=np.int64)
    start = 0
    for rank in range(len(share_R)):
        if share_R[rank]:
            lap, turn = np.divmod(np.arange(share_R[rank]), num_tokens)
            homed = np.flatnonzero(home_E == rank)
            expert_N[start : start + share_R[rank]] = homed[(lap + turn) % len(homed)]
            start += share_R[rank]
    return np.ascontiguousarray(expert_N.reshape(top_k, num_tokens).T)


def _shares(num_tokens: int, top_k: int, slots_R: NDArray[np.int64], batches: int) -> NDArray[np.int64]:
    """The rows of each rank in so many batches together: all the same, but at most one a token for each expert."""
    most_R = num_tokens * slots_R
    left, full_R = num_tokens * top_k, most_R == 0
    while (over_R := ~full_R & (most_R * (~full_R).sum() <= left)).any():
        full_R |= over_R
        left = num_tokens * top_k - int(most_R[full_R].sum())
    open_ = np.flatnonzero(~full_R)
    share_R = np.where(full_R, most_R, 0) * batches
    if len(open_):
        share_R[open_] = (left * batches + np.arange(len(open_))[::-1]) // len(open_)
    return share_R


def _sum_over_tokens(value_N: Tensor, rows: Rows, num_tokens: int) -> Tensor:
    if rows.top_k is not None:
        return value_N.view(num_tokens, rows.top_k).sum(dim=-1)
    return value_N.new_zeros(num_tokens).index_add(0, rows.token_N, value_N)


def _without_padding(rows: Rows, valid_T: Tensor | None) -> Rows:
    if valid_T is None:
        return rows
    return rows._replace(expert_N=rows.expert_N.where(valid_T[rows.token_N], NOWHERE))
