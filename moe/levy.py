"""Balancing losses of a model's layers, charged with the model's own loss.

    loss = charge(model, F.cross_entropy(...))
    loss.backward()

A layer deep inside the model cannot know how the loss it belongs to is scaled: for accumulation, by a GradScaler, by
the number of ranks. So it puts its cost into the graph beside its output and leaves the scale open. `charge`, at the
end of the graph, is the first to run backward. There it sees the gradient of the loss itself, whatever went into it,
and writes it on the slips of the layers, whose turn comes later. Recomputations carry the slip of the first forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from routing import Choice, Loss


@dataclass(eq=False)
class Slip:
    """What one forward of one layer owes: the mean over its tokens of each loss, and once charged, at which scale."""

    tokens: Tensor | int
    costs: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    share: Tensor | None = None
    """Its part of the whole loss, once charged."""

    @property
    def cost(self) -> Tensor:
        return torch.stack([*self.costs.values()]).sum()


class Levies(nn.Module):
    """The balancing losses of one layer, and the slips of its forwards that nobody has charged yet."""

    def __init__(self, losses: Sequence[Loss]) -> None:
        super().__init__()
        self.losses = tuple(losses)
        self.pooled = any(loss.pooled for loss in losses)
        self.open: list[Slip] = []
        self.last: Slip | None = None

    def open_slip(self, choice: Choice) -> Slip | None:
        """For a forward in training, once, whether or not it is recomputed."""
        if not self.losses:
            return None
        self.last = Slip(tokens=choice.tokens)
        self.open.append(self.last)
        return self.last

    def forward(self, y_TD: Tensor, choice: Choice, pool_E: Tensor | None, slip: Slip) -> Tensor:
        """y_TD, with the losses hanging on it. Notes on the slip what they come to."""
        tokens = slip.tokens.clamp(min=1) if isinstance(slip.tokens, Tensor) else max(slip.tokens, 1)
        costs = [loss(choice, pool_E).sum() / tokens for loss in self.losses]
        slip.costs = {}
        for loss, cost in zip(self.losses, costs):
            name = type(loss).__name__
            slip.costs[name] = slip.costs[name] + cost.detach() if name in slip.costs else cost.detach()
        return _Levy.apply(y_TD, torch.stack(costs).sum(), slip)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.losses))


def charge(model: nn.Module, loss: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    """The loss, and the balancing losses of every forward since the last charge. Charge each loss that goes backward.

    tokens: what the loss was averaged over. Without it, the tokens of this rank's batch: right for a loss that is a
    mean over them, to be averaged over micro-batches and ranks. Where it is a sum over a part of the tokens over the
    number of them all, say that number.
    """
    slips: list[Slip] = []
    for module in model.modules():
        if isinstance(module, Levies):
            slips += module.open
            module.open.clear()
    if not slips:
        return loss
    costs = [(slip.cost if tokens is None else slip.cost * slip.tokens / tokens).to(loss.device) for slip in slips]
    total = loss.detach() + torch.stack(costs).sum()
    for slip, cost in zip(slips, costs):
        slip.share = cost / total
    return _Charge.apply(loss, torch.stack(costs).sum(), slips, tokens)  # type: ignore[no-any-return, no-untyped-call]


class _Levy(torch.autograd.Function):
    """(y, cost) -> y. Backward: (dy, scale), the scale being what `charge` wrote on the slip."""

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, cost: Tensor, slip: Slip) -> Tensor:
        ctx.slip, ctx.dtype, ctx.device = slip, cost.dtype, cost.device
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.slip.scale is None:
            raise RuntimeError(
                "a MoE layer has balancing losses that were not charged; say `loss = charge(model, loss)` before "
                "loss.backward()"
            )
        return grads[0], ctx.slip.scale.to(ctx.device, ctx.dtype), None


class _Charge(torch.autograd.Function):
    """(loss, costs) -> loss + costs. Backward: dloss, written on the slips in passing."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Tensor, slips: list[Slip], tokens: Tensor | int | None) -> Tensor:
        ctx.slips, ctx.tokens = slips, tokens
        return loss + total.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        for slip in ctx.slips:
            slip.scale = grads[0] if ctx.tokens is None else grads[0] * slip.tokens / ctx.tokens
        return grads[0], None, None, None
