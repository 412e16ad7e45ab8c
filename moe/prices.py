"""Settling prices: once per optimiser step, all layers of a model, all ranks, one message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moe.census import Pool
from moe.comm import EVERYONE, Everyone, Group, Peers, sum_over
from routing import Router


@torch.no_grad()
def settle_prices(model: nn.Module, group: Group | Everyone = EVERYONE) -> None:
    """Close a step of every Router: sum its statistics over the ranks, and let its balancer set new prices.

    Call it on every rank once per optimiser step, and not when the step is skipped: what was seen then counts in the
    next. group: the ranks that see different tokens of the same layers. That is EVERYONE, all ranks of the default
    process group, unless some hold other layers (pipeline stages) or the same tokens (tensor parallelism).
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    sum_over([stat for router in routers for stat in router.stats.values()], Peers.of(group))
    for router in routers:
        router.settle()
    for module in model.modules():
        if isinstance(module, Pool):
            module.reset()


def settle_after(optimizer: Optimizer, model: nn.Module, group: Group | Everyone = EVERYONE) -> RemovableHandle:
    """Settle the prices after every step of this optimiser, until handle.remove().

    A step that a GradScaler skips settles nothing. It must skip on all ranks alike, or those that do not will wait for
    it: see `share_overflow`. A fused optimiser is called even so and skips on the device: under a GradScaler the host
    waits for its word.
    """

    def settle(optimizer: Optimizer, *_: Any) -> None:
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            settle_prices(model, group)

    return optimizer.register_step_post_hook(settle)
