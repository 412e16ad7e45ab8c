"""Fused: experts in Triton's kernels, and the steps of autograd around them for rows that only the device counts.

In a step of `visit` each gradient has its place: there the kernels are a Batch. `Planned` puts its layer together from
steps of autograd; here are three whose backward adds nothing by atomics, as an index_select of torch's would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.activation import Activation, SwiGLU
from moe.launch import Share, combine, combine_back, gated, gated_back, outer, permute, times
from moe.matmuls import All
from moe.stack import Back, Rows, Stack


@dataclass(frozen=True, eq=False)
class Tiles(All):
    """The rows of a whole stack, in Triton's kernels: SwiGLU with the gather before and the activation after it in the
    matmul, any other activation between matmuls."""

    @property
    def share(self) -> Share:
        return Share(self.end_A, self.rows.stop - self.rows.start)

    def times(self, row_MD: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        return times(Rows(row_MD, None), weight, bias, self.share, out)

    def times_back(self, drow_MF: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return times(Rows(drow_MF, None), weight.transpose(1, 2), None, self.share, out)

    def dweight(self, drow_MF: Tensor, row_MD: Tensor, out: Tensor) -> Tensor:
        return outer(Rows(drow_MF, None), Rows(row_MD, None), self.share, out)

    def forward(
        self,
        x: Rows,
        stack: Stack,
        activation: Activation,
        *,
        h_MF: Tensor | None,
        result_MD: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor]:
        if type(activation) is not SwiGLU:
            return super().forward(x, stack, activation, h_MF=h_MF, result_MD=result_MD, keep=keep)
        if keep and h_MF is None:
            h_MF = x.source_XD.new_empty(self.share.rows, stack.up.shape[1])
        a_MF = gated(self._mine(x), stack, self.share, h_MF if keep else None)
        result_MD = times(Rows(a_MF, None), stack.down, stack.down_bias, self.share, result_MD)
        return h_MF if keep else None, result_MD

    def backward(self, back: Back, stack: Stack, activation: Activation) -> None:
        if type(activation) is not SwiGLU:
            super().backward(back, stack, activation)
            return
        up, down, up_bias, down_bias = back.grads
        share, x, g = self.share, self._mine(back.x), self._mine(back.g)
        weight_M = None if back.weight_M is None else back.weight_M[self.rows].float()
        dh_MF, a_MF, dot_M = gated_back(g, stack, share, back.h_MF[self.rows], weight_M)
        if back.dweight_M is not None and dot_M is not None:
            if stack.down_bias is not None:
                dot_M += (back.g.pick(self.rows) * self.bias_of(stack.down_bias)).sum(dim=-1, dtype=torch.float32)
            back.dweight_M[self.rows] = dot_M
        if down is not None:
            outer(g, Rows(a_MF, None), share, down)
        if down_bias is not None:
            g_MD = back.g.pick(self.rows)
            g_MD = g_MD if weight_M is None else g_MD * weight_M[:, None]
            back.grads[3] = self.dbias(g_MD.to(stack.down.dtype), down_bias)
        if up is not None:
            outer(Rows(dh_MF, None), x, share, up)
        if up_bias is not None:
            back.grads[2] = self.dbias(dh_MF, up_bias)
        if back.drow_XD is not None:
            self.times_back(dh_MF, stack.up, back.drow_XD[self.rows])

    def _mine(self, rows: Rows) -> Rows:
        if rows.index_M is None:
            return Rows(rows.source_XD[self.rows], None)
        return Rows(rows.source_XD, rows.index_M[self.rows])


class Plan(NamedTuple):
    """The rows of experts, as the device has them: index_M, and inverse_XJ: which of them are of each source row,
    negative for none. row_A, end_A: as in All."""

    index_M: Tensor
    inverse_XJ: Tensor
    row_A: Tensor
    end_A: Tensor
    activation: Activation


def through(source_XD: Tensor, stack: Stack, plan: Plan) -> Tensor:
    """-> result_MD; anything where there is no row"""
    result_MD: Tensor = _Through.apply(plan, source_XD, *stack)  # type: ignore[no-untyped-call]
    return result_MD


def moved(row_XD: Tensor, index_M: Tensor, inverse_XJ: Tensor) -> Tensor:
    """-> row_XD[index_m], zeros where it is negative. inverse_XJ: as in Plan."""
    row_MD: Tensor = _Moved.apply(row_XD, index_M, inverse_XJ)  # type: ignore[no-untyped-call]
    return row_MD


def combined(row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """y_t = sum over k of weight_tk row(place_tk). No row has two places; a negative one is no row."""
    y_TD: Tensor = _Combined.apply(row_XD, place_TK, weight_TK)  # type: ignore[no-untyped-call]
    return y_TD


class _Through(torch.autograd.Function):
    """The formulas are those of `visit`, without weights of choices:

    forward:   h_m = up_e x_m + b_e,  y_m = down_e act(h_m) + c_e
    backward:  dx_s = sum over m of s of up_e^T dh_m, and so on
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, source_XD: Tensor, *weights: Tensor | None) -> Tensor:
        stack, tiles = Stack(*weights), _tiles(plan)  # type: ignore[arg-type]
        h_MF, result_MD = tiles.forward(
            Rows(source_XD, plan.index_M),
            stack,
            plan.activation,
            h_MF=None,
            result_MD=None,
            keep=any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(source_XD, h_MF, *weights)
        ctx.plan = plan
        return result_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresult_MD: Tensor) -> tuple[Tensor | None, ...]:
        source_XD, h_MF, *weights = ctx.saved_tensors
        _, wants_x, *wanted = ctx.needs_input_grad
        plan: Plan = ctx.plan
        back = Back(
            x=Rows(source_XD, plan.index_M),
            g=Rows(dresult_MD.contiguous(), None),
            h_MF=h_MF,
            weight_M=None,
            dweight_M=None,
            drow_XD=torch.empty_like(dresult_MD) if wants_x else None,
            grads=[torch.empty_like(weight) if wants else None for weight, wants in zip(weights, wanted, strict=True)],
        )
        _tiles(plan).backward(back, Stack(*weights), plan.activation)
        dx_XD = None if back.drow_XD is None else combine(back.drow_XD, plan.inverse_XJ, None)
        return None, dx_XD, *back.grads


class _Moved(torch.autograd.Function):
    """forward:   y_m = x(index_m)
    backward:  dx_s = sum over m of s of dy_m
    """

    @staticmethod
    def forward(ctx: Any, row_XD: Tensor, index_M: Tensor, inverse_XJ: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_XJ)
        return permute(row_XD, index_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drow_MD: Tensor) -> tuple[Tensor, None, None]:
        return combine(drow_MD, ctx.saved_tensors[0], None), None, None


class _Combined(torch.autograd.Function):
    """forward:   y_t = sum over k of w_tk x(place_tk)
    backward:  dx(place_tk) = w_tk dy_t,  dw_tk = <x(place_tk), dy_t>
    """

    @staticmethod
    def forward(ctx: Any, row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_XD, place_TK, weight_TK)
        return combine(row_XD, place_TK, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, Tensor]:
        drow_XD, dweight_TK = combine_back(dy_TD, *ctx.saved_tensors)
        return drow_XD, None, dweight_TK


def _tiles(plan: Plan) -> Tiles:
    return Tiles(slice(0, len(plan.index_M)), plan.row_A, plan.end_A)
