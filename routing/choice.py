"""Choice: what the router chose, as rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

NOWHERE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Row n sends token_N[n] to expert_N[n], and its result counts weight_N[n].

    A row with expert -1 goes nowhere: it belongs to padding, or was dropped. Its weight is 0, and nobody counts it.
    Such rows are kept because throwing them out would need their number on the host.

    token_N, expert_N: int64. wanted_N: the experts before any row was dropped, -1 for padding; expert_N itself if
    nothing drops rows. weight_N: from the unpriced score, with its gradient. score_TE, logit_TE: what the router saw,
    at least fp32, with their gradients. price_E: the prices it was made at. valid_T: False for padding, None if there
    is none. length: tokens are sequences of so many, end to end. top_k: K if the rows are K for each token, in token
    order; None for any other shape. k: how many experts the router was asked for, for each token or on average.
    """

    token_N: Tensor
    expert_N: Tensor
    wanted_N: Tensor
    weight_N: Tensor
    score_TE: Tensor
    logit_TE: Tensor
    price_E: Tensor
    valid_T: Tensor | None
    length: int
    top_k: int | None
    k: int

    @property
    def num_tokens(self) -> int:
        return self.score_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.score_TE.shape[1]

    @property
    def expert_TK(self) -> Tensor:
        """The rows of a top-k choice, a line for each token."""
        if self.top_k is None:
            raise ValueError("expert_TK is a view of a top-k choice; this one has any number of rows for each token")
        return rearrange(self.expert_N, "(t k) -> t k", k=self.top_k)

    @property
    def load_E(self) -> Tensor:
        """Rows for each expert; rows that go nowhere are not counted. int64, on the device, without a host sync."""
        return count_rows(self.expert_N, self.num_experts)

    @property
    def wanted_E(self) -> Tensor:
        """Rows that wanted each expert: its load, and the rows that were dropped."""
        return self.load_E if self.wanted_N is self.expert_N else count_rows(self.wanted_N, self.num_experts)

    @property
    def tokens(self) -> Tensor | int:
        """Tokens without padding; a tensor where the host does not know."""
        return self.num_tokens if self.valid_T is None else self.valid_T.sum()


def count_rows(expert_N: Tensor, num_experts: int) -> Tensor:
    load_E = expert_N.new_zeros(num_experts + 1)
    load_E.scatter_add_(0, expert_N + 1, torch.ones_like(expert_N))
    return load_E[1:]
