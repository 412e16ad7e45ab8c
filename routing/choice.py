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

    token_N, expert_N: int64. weight_N: from the unpriced score, with its gradient. score_TE, logit_TE: what the router
    saw, at least fp32, with their gradients. valid_T: False for padding, None if there is none. top_k: K if the rows
    are K for each token, in token order; None for any other shape.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    score_TE: Tensor
    logit_TE: Tensor
    valid_T: Tensor | None
    top_k: int | None

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
        load_E = self.expert_N.new_zeros(self.num_experts + 1)
        load_E.scatter_add_(0, self.expert_N + 1, torch.ones_like(self.expert_N))
        return load_E[1:]
