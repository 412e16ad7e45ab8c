"""Margins: the scores of a batch, and the best prices on them given those of the other side; see `dual`.

dual.cpp has the same prices to the bit, several times sooner, for fp32 on a CPU and K up to 16.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from routing.dual import INF, Ends, expert_ends, expert_lower, token_ends, token_lower, transposed
from routing.native import DECIDERS

MOST_K = 16  # dual.cpp has as many registers


class Margins:
    """score_TE: without NaN. valid_T: False for padding, which has no say in the experts' prices."""

    def __init__(self, score_TE: Tensor, top_k: int, valid_T: Tensor | None = None) -> None:
        self.score_TE, self.top_k, self.valid_T = score_TE.detach(), top_k, valid_T
        plain = type(self.score_TE) is Tensor and score_TE.device.type == "cpu" and score_TE.dtype == torch.float32
        fits = len(score_TE) > 0 and top_k <= min(MOST_K, score_TE.shape[1] - 1)
        self._library = DECIDERS.load() if plain and fits else None

    def token_ends(self, price_E: Tensor) -> Ends:
        if self._library is None:
            return token_ends(self.score_TE - price_E, self.top_k)
        tokens, experts = self.score_TE.shape
        ends = Ends(*self.score_TE.new_empty(2, tokens))
        price_E = price_E.contiguous()
        places = [tensor.data_ptr() for tensor in (self._score_ET, price_E, *ends)]
        self._library.evenmoe_token_ends(*places[:2], tokens, experts, self.top_k, *places[2:], torch.get_num_threads())
        return ends

    def token_lower(self, price_E: Tensor) -> Tensor:
        if self._library is None:
            return token_lower(self.score_TE - price_E, self.top_k)
        return self.token_ends(price_E).lower

    def expert_ends(self, price_T: Tensor) -> Ends:
        if self._library is None:
            return expert_ends(self._score_ET - price_T, self.top_k, self.valid_T)
        return self._compiled_ends(price_T, -INF)

    def expert_lower(self, price_T: Tensor, floor: float) -> Tensor:
        """Nothing below the floor."""
        if self._library is None:
            return expert_lower(self._score_ET - price_T, self.top_k, self.valid_T).clamp(min=floor)
        return self._compiled_ends(price_T, floor).lower

    def _compiled_ends(self, price_T: Tensor, floor: float) -> Ends:
        assert self._library is not None
        tokens, experts = self.score_TE.shape
        price_T = price_T.contiguous() if self.valid_T is None else price_T.where(self.valid_T, INF)
        ends = Ends(*self.score_TE.new_empty(2, experts))
        self._library.evenmoe_expert_ends(
            self._score_ET.data_ptr(),
            price_T.data_ptr(),
            tokens,
            experts,
            self.top_k,
            floor,
            *(tensor.data_ptr() for tensor in ends),
            torch.get_num_threads(),
        )
        return ends

    @cached_property
    def _score_ET(self) -> Tensor:
        return transposed(self.score_TE)
