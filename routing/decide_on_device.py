"""Decide on the device: experts, weights and loads from scores and prices, in one kernel where Triton has a GPU.

A Router with TopK(fused=True) takes its top-k from the same kernel, and weighs with Weigh, since between the two rows
may be dropped or replayed. This is for whoever does neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from routing import launch
from routing.choice import NOWHERE, count_rows
from routing.select import token_major
from routing.top_k import best_experts
from routing.weigh import Weigh


class Decision(NamedTuple):
    """expert_TK: int64, best first. weight_TK: with its gradient. load_E: rows of each expert, int64."""

    expert_TK: Tensor
    weight_TK: Tensor
    load_E: Tensor


def decide_on_device(
    score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None = None, weigh: Weigh = Weigh()
) -> Decision:
    """The top_k best of score_TE - price_E, weighed by score alone; padding (valid_T False) has expert -1, weight 0 and
    no load.

    The host waits for nothing, and all shapes are known before. In the kernel equals go to the lowest expert and NaN is
    the greatest; it takes fp32 on a GPU from Ampere on. The rest is torch's, equals included.
    """
    tokens, experts = score_TE.shape
    if price_E.shape != (experts,) or not 1 <= top_k <= experts:
        raise ValueError(
            f"{experts} experts: price_E must be {[experts]} and 1 <= top_k <= {experts}; got "
            f"{list(price_E.shape)} and top_k={top_k}"
        )
    if valid_T is not None and (valid_T.dtype != torch.bool or valid_T.shape != (tokens,)):
        raise ValueError(f"valid_T must be bool and {[tokens]}; got {valid_T.dtype} and {list(valid_T.shape)}")
    if launch.kernel_takes(score_TE, price_E, top_k):
        return Decision(*_Decide.apply(score_TE, price_E, top_k, valid_T, weigh))  # type: ignore[no-untyped-call]
    expert_TK = best_experts(score_TE.detach(), price_E.detach(), top_k)
    if valid_T is not None:
        expert_TK = expert_TK.where(valid_T[:, None], NOWHERE)
    rows = token_major(expert_TK)
    weight_TK = weigh(score_TE, rows).view(tokens, top_k)
    return Decision(expert_TK, weight_TK, count_rows(rows.expert_N, experts))


class _Decide(torch.autograd.Function):
    """Of the scores s_k of a token's choices, their sum S and the scale c:

    forward:   w_k = c s_k / (S + 1e-20), or c s_k
    backward:  ds_k = c (dw_k - sum over j of dw_j s_j / (S + 1e-20)) / (S + 1e-20), or c dw_k; 0 for other experts
    """

    @staticmethod
    def forward(
        ctx: Any, score_TE: Tensor, price_E: Tensor, top_k: int, valid_T: Tensor | None, weigh: Weigh
    ) -> launch.Decided:
        decided = launch.decide(score_TE, price_E, top_k, valid_T, weigh.normalize, weigh.scale)
        ctx.mark_non_differentiable(decided.expert_TK, decided.load_E)
        ctx.save_for_backward(score_TE, decided.expert_TK)
        ctx.weigh = weigh
        return decided

    @staticmethod
    def backward(ctx: Any, _expert: None, dweight_TK: Tensor, _load: None) -> tuple[Tensor | None, ...]:
        """In torch: K numbers a token, and no two of them in one place, so nothing is sorted or added by atomics."""
        score_TE, expert_TK = ctx.saved_tensors
        there_TK, place_TK = expert_TK != NOWHERE, expert_TK.clamp(min=0)
        ds_TK = dweight_TK * ctx.weigh.scale
        if ctx.weigh.normalize:
            s_TK = score_TE.gather(1, place_TK)
            total_T1 = s_TK.sum(dim=-1, keepdim=True) + 1e-20
            ds_TK = (ds_TK - (ds_TK * s_TK).sum(dim=-1, keepdim=True) / total_T1) / total_T1
        ds_TK = ds_TK.where(there_TK, 0.0)
        return torch.zeros_like(score_TE).scatter(1, place_TK, ds_TK), None, None, None, None
