"""The oracle: a mixture of experts as literally as it can be written, on one process. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.activation import Activation
from routing import Choice


def reference(
    x_TD: Tensor, choice: Choice, state: Mapping[int, Mapping[str, Tensor]], activation: Activation
) -> Tensor:
    """y_t = sum over the rows n of t of weight_n * expert_n(x_t), one row after the other.

    state: every expert's weights, as in MoE.expert_state.
    """
    y_T = [torch.zeros_like(x_D) for x_D in x_TD]
    for token, expert, weight in zip(choice.token_N.tolist(), choice.expert_N.tolist(), choice.weight_N):
        if expert >= 0:
            own = state[expert]
            h_F = activation(F.linear(x_TD[token], own["up"], own.get("up_bias")))
            y_T[token] = y_T[token] + weight * F.linear(h_F, own["down"], own.get("down_bias"))
    return torch.stack(y_T) if y_T else x_TD.clone()
