"""Our compute under a name that transformers knows: `from_pretrained(..., experts_implementation="evenmoe")`.

This is the experts' arithmetic in one process, where a model need not be patched. Spreading them takes
`parallelize_experts`: what is registered is handed whole experts, and there is no place in it for a group.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from moe.comm import Peers
from moe.compute import Fastest
from moe.dispatch import Dispatch
from moe.experts import compute_dtype
from moe.guests import Nobody
from moe.integrations.huggingface.experts import Host, problem_with, sizes_of
from moe.stack import Stack
from moe.visit import visit
from routing import NOWHERE, Assignment, Choice, token_major

NAME = "evenmoe"


def register_experts_implementation(name: str = NAME) -> str:
    """Tell transformers of our compute. -> the name"""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise ValueError(
            f"transformers {transformers.__version__} has no registry of experts implementations; use 5.22.2 or later, "
            f"or parallelize_experts(model)"
        ) from None
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    return name


@torch.compiler.disable  # type: ignore[untyped-decorator]
def experts_forward(host: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of its experts' forward."""
    if (problem := problem_with(host)) is not None:
        raise ValueError(f"{type(host).__name__} {problem}")
    (num_experts, _, _), dtype = sizes_of(host), compute_dtype(hidden_states)
    choice = _choice(top_k_index, top_k_weights, num_experts)
    count_RE = choice.load_E.cpu().numpy()[None]
    everything = Assignment(count_RE=count_RE, quota_RE=np.copy(count_RE))
    dispatch = Dispatch.of(choice, everything, range(num_experts), Peers.of(None))
    stack = Stack._make(None if weight is None else weight.to(dtype) for weight in Host(host).stack())
    activation = Host(host).activation
    y_TD = visit(hidden_states.to(dtype), choice.weight_N, dispatch, stack, Nobody(), Fastest(), activation)
    return y_TD.to(hidden_states.dtype)


def _choice(expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Choice:
    """The host's choice as rows, of scores unknown."""
    rows = token_major(expert_TK.to(torch.int64))
    expert_N = rows.expert_N.where(rows.expert_N < num_experts, NOWHERE)
    unknown_TE = weight_TK.new_zeros(1, 1).expand(len(expert_TK), num_experts)
    return Choice(
        token_N=rows.token_N,
        expert_N=expert_N,
        wanted_N=expert_N,
        weight_N=weight_TK.reshape(-1).where(expert_N != NOWHERE, 0.0),
        score_TE=unknown_TE,
        logit_TE=unknown_TE,
        price_E=unknown_TE.new_zeros(num_experts),
        valid_T=None,
        length=len(expert_TK),
        top_k=rows.top_k,
        k=expert_TK.shape[1],
    )
