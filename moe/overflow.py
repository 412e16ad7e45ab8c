"""Overflow: a gradient that overflows on one rank makes all ranks skip the step.

An expert's gradient is of its rank alone. A GradScaler that finds it infinite skips the step there and nowhere else:
what ought to be alike on all ranks, weights and the scale, drifts apart, and who settles prices waits for who does not.
torch's ShardedGradScaler asks all ranks, but not under a fused optimiser (in torch 2.13 that fails).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe.comm import EVERYONE, Everyone, Group, Peers, here, max_over


@torch.no_grad()
def share_overflow(optimizer: Optimizer, group: Group | Everyone = EVERYONE) -> None:
    """Where a gradient of this optimiser is not finite on one rank, one becomes so on each, for any GradScaler to find.

    Call it on every rank after backward, before the scaler's `unscale_` or `step`. group: the ranks that step together,
    all of those whose weights or prices ought to agree. The host waits for nothing; finite gradients stay as they are.
    ValueError on a rank where this optimiser has no gradient to tell its scaler by.
    """
    weights = [weight for part in optimizer.param_groups for weight in part["params"]]
    grads = [grad for grad in (_numbers_of(weight) for weight in weights if weight.grad is not None) if grad.numel()]
    over = torch.zeros(1, device=here(weights[0]).device)
    if grads:
        finite = [torch.linalg.vector_norm(grad, torch.inf).isfinite().to(over.device) for grad in grads]
        over += ~torch.stack(finite).all()
    max_over([over], Peers.of(group))
    if not grads:
        raise ValueError(
            "no weight of this optimiser has a gradient here, so a GradScaler would step though another rank skips; "
            "let it have weights that every rank has, such as the routers', or give every rank an expert"
        )
    first = grads[0][(slice(1),) * grads[0].ndim]
    first.copy_(torch.where(over.to(first.device) > 0, torch.inf, first.flatten()).view_as(first))


def _numbers_of(weight: Tensor) -> Tensor:
    """What is here of its gradient; of a sparse one, what it holds."""
    assert weight.grad is not None
    if not weight.grad.is_sparse:
        return here(weight.grad)
    weight.grad = weight.grad.coalesce()
    return weight.grad.values()
