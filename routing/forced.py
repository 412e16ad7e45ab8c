"""ForcedRouter: balance by force, an upper bound for balancers that earn it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing.router import Router
from routing.select import Rows, Tokens, token_major


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

    def select_rows(self, score_TE: Tensor, price_E: Tensor, tokens: Tokens) -> Rows:
        table_TK = forced_experts(score_TE.shape[0], self.top_k, self.home_E, source=self.source)
        return token_major(torch.from_numpy(table_TK).to(score_TE.device, non_blocking=True))


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
