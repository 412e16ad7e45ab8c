"""Swap: rows and experts change ranks in messages of equal sizes, whatever was routed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.comm import Peers, exchange
from routing import at_least_fp32


def swap(row_XD: Tensor, peers: Peers) -> Tensor:
    """As many rows to each rank, and from each."""
    equal = (len(row_XD) // peers.size,) * peers.size
    return exchange(row_XD, equal, equal, peers)


def visit_all(weight: Tensor, pick_W: Tensor, peers: Peers) -> Tensor:
    """The experts picked go to visit, as many to each rank. -> those that visit here"""
    visiting: Tensor = _Visit.apply(weight, pick_W, peers)  # type: ignore[no-untyped-call]
    return visiting


class _Visit(torch.autograd.Function):
    """forward:   visitors = P W[pick]      P the equal all-to-all
    backward:  dW[pick] += P^T dvisitors, added in fp32 or better
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pick_W: Tensor, peers: Peers) -> Tensor:
        ctx.save_for_backward(pick_W)
        ctx.peers, ctx.shape = peers, weight.shape
        return swap(weight.index_select(0, pick_W), peers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvisiting: Tensor) -> tuple[Tensor, None, None]:
        came = swap(dvisiting.contiguous(), ctx.peers)
        dweight = came.new_zeros(ctx.shape, dtype=at_least_fp32(came.dtype))
        dweight.index_add_(0, ctx.saved_tensors[0], came.to(dweight.dtype))
        return dweight.to(came.dtype), None, None


def guard(weight: Tensor, busy_A: Tensor) -> Tensor:
    """The weights, whose gradient is zero where an expert has no rows."""
    guarded: Tensor = _Guard.apply(weight, busy_A)  # type: ignore[no-untyped-call]
    return guarded


class _Guard(torch.autograd.Function):
    """forward:   W
    backward:  dW where the expert has rows, else 0, for a grouped matmul may write nothing there
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, busy_A: Tensor) -> Tensor:
        ctx.save_for_backward(busy_A)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, None]:
        (busy_A,) = ctx.saved_tensors
        return dweight.where(busy_A.view(-1, *[1] * (dweight.ndim - 1)), 0.0), None
