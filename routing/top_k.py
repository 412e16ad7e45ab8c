"""The K best experts of each token: torch.topk, and sooner where it is compiled or Triton has a GPU.

top_k.cpp knows no order among equals. A token that has some where it matters, or a NaN, is torch's to decide, so both
paths choose the same to the bit. On a GPU, where torch.topk promises nothing of equals, Triton's kernel takes the
lowest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from routing import launch
from routing.native import DECIDERS

MOST_K = 16  # top_k.cpp has as many registers


def best_experts(priced_TE: Tensor, top_k: int) -> Tensor:
    """-> expert_TK, best first; among equals, whichever torch.topk prefers on that device, and in Triton the lowest"""
    if launch.kernel_takes(priced_TE, None, top_k):
        return launch.choose(priced_TE, None, top_k)
    plain = launch.is_plain(priced_TE) and priced_TE.device.type == "cpu"
    fits = len(priced_TE) > 0 and 1 <= top_k <= min(MOST_K, priced_TE.shape[1])
    library = DECIDERS.load() if plain and fits else None
    if library is None:
        return priced_TE.topk(top_k, dim=-1).indices
    priced_TE, (tokens, experts) = priced_TE.contiguous(), priced_TE.shape
    expert_TK = torch.empty(tokens, top_k, dtype=torch.int64)
    odd_T = torch.empty(tokens, dtype=torch.bool)
    places = expert_TK.data_ptr(), odd_T.data_ptr()
    if library.evenmoe_top_k(priced_TE.data_ptr(), tokens, experts, top_k, *places, torch.get_num_threads()):
        expert_TK[odd_T] = priced_TE[odd_T].topk(top_k, dim=-1).indices
    return expert_TK
