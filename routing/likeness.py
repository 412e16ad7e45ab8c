"""Likeness: of every token to every expert. Of narrow tensors no wide copies are kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_WIDE_AT_A_TIME = 2**20  # numbers; what a CPU's cache holds


def likeness(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """-> x W^T, computed and given in dtype"""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # by torch.func, which wants its own steps
    if x_TD.dtype == dtype or transformed:
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))
    logit_TE: Tensor = _Likeness.apply(x_TD, weight_ED, dtype)  # type: ignore[no-untyped-call]
    return logit_TE


def outside_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off for the tensor's device. Where it is off, entering it to say so takes longer than a small matmul."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Likeness(torch.autograd.Function):
    """forward:   l = x W^T
    backward:  dx = dl W,   dW = dl^T x

    Saved are x and W as they came. Autograd through `x.float()` would keep a wide copy of all tokens in every layer.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.dtype = dtype
        wide_DE = weight_ED.to(dtype).t()
        return torch.cat([part_TD.to(dtype) @ wide_DE for part_TD in torch.split(x_TD, _at_a_time(x_TD))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogit_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        parts = list(zip(*(torch.split(each_TX, _at_a_time(x_TD)) for each_TX in (dlogit_TE, x_TD))))
        dx_TD = dweight_ED = None
        with outside_autocast(x_TD):
            if needs_x:
                wide_ED = weight_ED.to(ctx.dtype)
                dx_TD = torch.cat([(dpart_TE @ wide_ED).to(x_TD.dtype) for dpart_TE, _ in parts])
            if needs_weight:
                dweight_ED = torch.zeros_like(weight_ED, dtype=ctx.dtype)
                for dpart_TE, part_TD in parts:
                    dweight_ED.addmm_(dpart_TE.t(), part_TD.to(ctx.dtype))
                dweight_ED = dweight_ED.to(weight_ED.dtype)
        return dx_TD, dweight_ED, None


def _at_a_time(x_TD: Tensor) -> int:
    """So many tokens that their wide copy stays in a CPU's cache; all on other devices, and while compiling."""
    tokens, dim = x_TD.shape
    whole = x_TD.device.type != "cpu" or torch.compiler.is_compiling()
    return max(tokens, 1) if whole else max(_WIDE_AT_A_TIME // dim, 64)
