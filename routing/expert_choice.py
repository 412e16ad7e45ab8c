"""ExpertChoice: experts choose tokens, so every expert gets the same load by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from routing.choice import NOWHERE
from routing.mask_ratio import Constant, Share
from routing.select import Rows, Tokens


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """Each expert takes its c best tokens of each "sequence", or of the whole "batch" of a rank.

    c = max(1, floor(S * k / E)), S being the tokens without padding and k what `share` says of the sequence; of a
    batch, S * k is the sum over its sequences. A token may be taken by many experts, or by none. Among equal scores,
    whichever torch.topk prefers. Prices change nothing: a price is the same for all tokens, among which an expert
    chooses. Whether a token is taken depends on those after it: not for models that predict the next token.

    The rows lie by sequence, then expert, best first. Their number is known to the host: it is that of unpadded
    sequences at the largest k, and the rows that are too many go nowhere.
    """

    within: Literal["sequence", "batch"] = "sequence"
    share: Share = Constant()

    def __post_init__(self) -> None:
        if self.within not in ("sequence", "batch"):
            raise ValueError(f"ExpertChoice cannot choose within a {self.within!r}; use 'sequence' or 'batch'")

    def check(self, num_experts: int, top_k: int) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of {num_experts} experts; use 1 <= top_k <= num_experts")
        self.share.check(num_experts, top_k)

    def __call__(self, score_TE: Tensor, price_E: Tensor, top_k: int, tokens: Tokens) -> Rows:
        priced_TE = score_TE - price_E
        num_tokens, num_experts = priced_TE.shape
        if not num_tokens:
            none = torch.empty(0, dtype=torch.int64, device=priced_TE.device)
            return Rows(none, none, None)
        take_B = self._take(num_tokens, num_experts, top_k, tokens, priced_TE.device)
        length = num_tokens // len(take_B)
        if tokens.valid_T is not None:
            priced_TE = priced_TE.masked_fill(~tokens.valid_T[:, None], float("-inf"))
        most = min(length, max(1, length * self.share.most_k(top_k) // num_experts))
        place_BEC = rearrange(priced_TE, "(b s) e -> b e s", s=length).topk(most, dim=-1).indices
        first_B11 = torch.arange(0, num_tokens, length, device=place_BEC.device)[:, None, None]
        taken_B1C = torch.arange(most, device=place_BEC.device) < take_B[:, None, None]
        expert_BEC = repeat(
            torch.arange(num_experts, device=place_BEC.device), "e -> b e c", b=len(take_B), c=most
        ).where(taken_B1C, NOWHERE)
        return Rows(
            rearrange(place_BEC + first_B11, "b e c -> (b e c)"), rearrange(expert_BEC, "b e c -> (b e c)"), None
        )

    def _take(self, num_tokens: int, num_experts: int, top_k: int, tokens: Tokens, device: torch.device) -> Tensor:
        """c of each sequence, or of the one batch. Padding is never taken, not even for want of others. -> take_B"""
        valid_T = torch.ones(num_tokens, dtype=torch.bool, device=device) if tokens.valid_T is None else tokens.valid_T
        valid_B = rearrange(valid_T, "(b s) -> b s", s=tokens.length).sum(dim=-1)
        wanted_B = valid_B * self.share(top_k, tokens)
        if self.within == "batch":
            valid_B, wanted_B = valid_B.sum(dim=0, keepdim=True), wanted_B.sum(dim=0, keepdim=True)
        return (wanted_B // num_experts).clamp(min=1).minimum(valid_B)
