"""Balancing losses of a model's layers, charged with the model's own loss.

    loss = charge(model, F.cross_entropy(...))
    loss.backward()

A layer deep inside the model cannot know how the loss it belongs to is scaled: for accumulation, by a GradScaler, by
the number of ranks. So it puts its cost into the graph beside its output and leaves the scale open. `charge`, at the
end of the graph, is the first to run backward. There it sees the gradient of the loss itself, whatever went into it,
and writes it on the slips of the layers, whose turn comes later. Recomputations carry the slip of the first forward.

A slip lives as long as the graph or the checkpoint that it belongs to. So forwards without gradients owe nothing and
leave nothing behind, and one whose graph is thrown away is forgotten with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from routing import Choice, Loss


@dataclass(eq=False)
class Slip:
    """What one forward of one layer owes: the mean over its tokens, and once charged, at which scale."""

    tokens: Tensor | int
    cost: Tensor | None = None
    scale: Tensor | None = None

    def costs(self, tokens: Tensor | int | None) -> Tensor:
        """Its part of a loss that was averaged over so many tokens; None: over its own."""
        assert self.cost is not None
        return self.cost if tokens is None else self.cost * self.tokens / tokens


class Levies(nn.Module):
    """The balancing losses of one layer, and the slips of its forwards that nobody has charged yet.

    share: their part of the whole loss that was charged last.
    """

    def __init__(self, losses: Sequence[Loss]) -> None:
        super().__init__()
        self.losses = tuple(losses)
        self.pooled = any(loss.pooled for loss in losses)
        self.share: Tensor | None = None
        self._open: list[weakref.ref[Slip]] = []

    def open_slip(self, choice: Choice) -> Slip | None:
        """For a forward in training, once, whether or not it is recomputed."""
        if not self.losses:
            return None
        slip = Slip(tokens=choice.tokens)
        self._open = [other for other in self._open if other() is not None]
        self._open.append(weakref.ref(slip))
        return slip

    def close_slips(self) -> list[Slip]:
        """Those of forwards whose loss may still go backward. Each is handed out once."""
        slips = [slip for slip in (other() for other in self._open) if slip is not None and slip.cost is not None]
        self._open.clear()
        return slips

    def forward(self, y_TD: Tensor, choice: Choice, pool_E: Tensor | None, slip: Slip) -> Tensor:
        """y_TD, with the losses hanging on it. Notes on the slip what they cost."""
        tokens = slip.tokens.clamp(min=1) if isinstance(slip.tokens, Tensor) else max(slip.tokens, 1)
        cost = torch.stack([loss(choice, pool_E).sum() / tokens for loss in self.losses]).sum()
        slip.cost = cost.detach()
        return _Levy.apply(y_TD, cost, slip)  # type: ignore[no-any-return, no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they have made no forwards."""
        return self.__dict__ | {"_open": []}

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.losses))


def charge(model: nn.Module, loss: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    """The loss, and the balancing losses of every forward since the last charge. Charge each loss that goes backward,
    and scale it afterwards: `charge(model, loss) / micro_batches`.

    tokens: what the loss was averaged over. Without it, the tokens of this rank's batch: right for a loss that is a
    mean over them, to be averaged over micro-batches and ranks. Where it is a sum over a part of the tokens over the
    number of them all, say that number.
    """
    if loss.numel() != 1:
        raise ValueError(f"charge takes the loss as one number; got shape {list(loss.shape)}: average it first")
    if isinstance(tokens, int) and tokens < 1:
        raise ValueError(f"tokens={tokens}; say over how many the loss was averaged, at least 1")
    slips_of = {module: module.close_slips() for module in model.modules() if isinstance(module, Levies)}
    slips = [slip for own in slips_of.values() for slip in own]
    if not slips:
        return loss
    cost_of = {
        levies: torch.stack([slip.costs(tokens).to(loss.device) for slip in own]).sum()
        for levies, own in slips_of.items()
        if own
    }
    cost = torch.stack(list(cost_of.values())).sum()
    for levies, own_cost in cost_of.items():
        levies.share = own_cost / (loss.detach().reshape(()) + cost)
    return _Charge.apply(loss, cost, slips, tokens)  # type: ignore[no-any-return, no-untyped-call]


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
