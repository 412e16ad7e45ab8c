"""The K best experts of each token by score less price: torch.topk, and sooner where compiled, or asked of Triton.

top_k.cpp knows no order among equals. A token that has some where it matters, or a NaN, is torch's to decide, so both
paths choose the same to the bit. Triton's kernel takes the lowest of equals, of which torch.topk promises nothing on a
GPU; no GPU has run it yet, so nobody gets it unasked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from routing import launch
from routing.native import DECIDERS

MOST_K = 16  # top_k.cpp has as many registers


def best_experts(score_TE: Tensor, price_E: Tensor, top_k: int, fused: bool = False) -> Tensor:
    """-> expert_TK, best first; among equals, whichever torch.topk prefers on that device.

    fused: by Triton's kernel where it can, which takes the lowest of equals.
    """
    if fused and launch.kernel_takes(score_TE, price_E, top_k):
        return launch.choose(score_TE, price_E, top_k)
    plain = launch.is_plain(score_TE, price_E) and score_TE.device.type == price_E.device.type == "cpu"
    fits = len(score_TE) > 0 and 1 <= top_k <= min(MOST_K, score_TE.shape[1]) and price_E.shape == score_TE.shape[1:]
    library = DECIDERS.load() if plain and fits else None
    if library is None:
        return (score_TE - price_E).topk(top_k, dim=-1).indices
    score_TE, price_E, (tokens, experts) = score_TE.contiguous(), price_E.contiguous(), score_TE.shape
    expert_TK = score_TE.new_empty(tokens, top_k, dtype=torch.int64)
    odd_T = score_TE.new_empty(tokens, dtype=torch.bool)
    given, made = (score_TE.data_ptr(), price_E.data_ptr()), (expert_TK.data_ptr(), odd_T.data_ptr())
    if library.evenmoe_top_k(*given, tokens, experts, top_k, *made, torch.get_num_threads()):
        expert_TK[odd_T] = (score_TE[odd_T] - price_E).topk(top_k, dim=-1).indices
    return expert_TK
