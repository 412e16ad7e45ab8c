"""Visit: tokens go to experts and results come home, in one step of autograd.

One step, so that neither the K rows of each token nor its K results are kept, or even made where a gather will do: from
forward to backward live the tokens, the guests' rows, and h, what goes into the activations. The weight of a choice is
applied once on the way forward, in fp32, where results are added; on the way back on the narrow side, to what lies
between an expert's two matrices. Its own gradient is found there too, so results need not be kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.activation import Activation, linearise
from moe.compute import Batch, Compute, Stack
from routing import at_least_fp32


class Trip(Protocol):
    """The way of rows to this rank's experts and of what they make back. M: rows computed here, sorted by expert.

    X rows in a buffer may be more than M: room for what comes home from other ranks.
    """

    @property
    def rows_A(self) -> tuple[int, ...]: ...

    @property
    def index_M(self) -> Tensor | None:
        """Where each row is found among those that `go` brings; None: there they are, in this order."""

    @property
    def room(self) -> int:
        """X - M"""

    def go(self, x_TD: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """-> rows from which index_M picks, and weight_M"""

    def come(self, row_XD: Tensor | None, scalar_M: Tensor | None) -> Tensor | None:
        """The first M rows go back, and what comes home fills the room. -> scalar_N"""

    def total(self, row_XD: Tensor, weight_N: Tensor | None) -> Tensor:
        """The (weighted) rows of each token, added. -> y_TD"""


@dataclass(frozen=True, kw_only=True)
class Stay:
    """No way at all: the rows lie here, sorted by expert, and so do the results."""

    rows_A: tuple[int, ...]
    index_M: None = None
    room: int = 0

    def go(self, x_TD: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return x_TD, weight_N

    def come(self, row_XD: Tensor | None, scalar_M: Tensor | None) -> Tensor | None:
        return scalar_M

    def total(self, row_XD: Tensor, weight_N: Tensor | None) -> Tensor:
        return row_XD if weight_N is None else (row_XD * weight_N[:, None]).to(row_XD.dtype)


def visit(
    x_TD: Tensor,
    weight_N: Tensor | None,
    trip: Trip,
    own: Stack,
    visiting: Stack,
    compute: Compute,
    activation: Activation,
) -> Tensor:
    """y_t = sum over the choices n = (t, e) of weight_n expert_e(x_t). The experts here are `own`, then `visiting`."""
    plan = _Plan(trip, compute, activation, torch.is_grad_enabled())
    y_TD: Tensor = _Visit.apply(plan, x_TD, weight_N, *own, *visiting)  # type: ignore[no-untyped-call]
    return y_TD


class _Plan(NamedTuple):
    trip: Trip
    compute: Compute
    activation: Activation
    keep: bool

    def batches(self, stacks: Sequence[Stack]) -> list[tuple[int, Batch]]:
        """(which stack, batch), in the order of the rows."""
        start, rows_A, batches = 0, self.trip.rows_A, []
        for which, stack in enumerate(stacks):
            mine, rows_A = rows_A[: len(stack.up)], rows_A[len(stack.up) :]
            if mine:
                batches += [(which, batch) for batch in self.compute(mine, stack, start)]
            start += sum(mine)
        return batches


class _Visit(torch.autograd.Function):
    """forward:   h_m = up_e x_m + b_e,  a_m = act(h_m),  y_t = sum over m of t of w_m (down_e a_m + c_e)
    backward:  g_m = dy_t,  s_m = down_e^T g_m,  dh_m = act'(h_m)^T w_m s_m
               dw_m = <s_m, a_m> + <g_m, c_e>,  dx_t = sum over m of t of up_e^T dh_m
               dup_e = sum of dh_m x_m^T,  db_e = sum of dh_m,  ddown_e = sum of g_m (w_m a_m)^T,  dc_e = sum of w_m g_m
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x_TD: Tensor, weight_N: Tensor | None, *weights: Tensor | None) -> Tensor:
        trip, stacks = plan.trip, _stacks(weights)
        with torch.autocast(x_TD.device.type, enabled=False):
            source_XD, _ = trip.go(x_TD, None)
            result_XD, h_MF = _forward(plan, source_XD, stacks)
            trip.come(result_XD, None)
            ctx.plan = plan
            if plan.keep:
                ctx.save_for_backward(source_XD, h_MF, weight_N, *weights)
            return trip.total(result_XD, None if weight_N is None else _wide(weight_N, x_TD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        source_XD, h_MF, weight_N, *weights = ctx.saved_tensors
        trip: Trip = ctx.plan.trip
        _, x, weight, *others = ctx.needs_input_grad
        wants = _Wants(x, weight, tuple(others))
        with torch.autocast(dy_TD.device.type, enabled=False):
            g_XD, weight_M = trip.go(dy_TD.contiguous(), None if weight_N is None else _wide(weight_N, dy_TD))
            back = _Backward(ctx.plan, wants, _stacks(weights), source_XD, g_XD, h_MF, weight_M)
            back.run()
            if not (wants.x or wants.weight):
                return None, None, None, *back.grads
            # The gradient of the weight travels with that of x wherever x wants one: its own wish is not every rank's.
            dweight_N = trip.come(back.drow_XD, back.dweight_M)
            dx_TD = None if back.drow_XD is None else trip.total(back.drow_XD, None)
            dweight_N = None if dweight_N is None or not wants.weight else dweight_N.to(weight_N.dtype)
            return None, dx_TD, dweight_N, *back.grads


class _Wants(NamedTuple):
    x: bool
    weight: bool
    weights: tuple[bool, ...]


def _forward(plan: _Plan, source_XD: Tensor, stacks: Sequence[Stack]) -> tuple[Tensor, Tensor | None]:
    """-> results with room, and h if it is to be kept. A lone batch's own tensors are taken as they are."""
    trip, batches, (fan_hidden, dim) = plan.trip, plan.batches(stacks), (stacks[0].up.shape[1], stacks[0].down.shape[1])
    num_rows = sum(trip.rows_A)
    result_XD = h_MF = None
    if len(batches) != 1 or trip.room:
        result_XD = source_XD.new_empty(num_rows + trip.room, dim)
    if len(batches) != 1 and plan.keep:
        h_MF = source_XD.new_empty(num_rows, fan_hidden)
    h = result = None
    for which, batch in batches:
        stack, rows = stacks[which], batch.rows
        h = batch.times(_pick(source_XD, trip, rows), stack.up, stack.up_bias, None if h_MF is None else h_MF[rows])
        place = None if result_XD is None else result_XD[rows]
        result = batch.times(plan.activation(h), stack.down, stack.down_bias, place)
    result_XD = result if result_XD is None else result_XD
    assert result_XD is not None
    return result_XD, (h if h_MF is None else h_MF) if plan.keep else None


class _Backward:
    """The gradients of all that took part, batch by batch, each written where it belongs."""

    def __init__(
        self,
        plan: _Plan,
        wants: _Wants,
        stacks: Sequence[Stack],
        source_XD: Tensor,
        g_XD: Tensor,
        h_MF: Tensor,
        weight_M: Tensor | None,
    ) -> None:
        self.plan, self.stacks, self.wants = plan, stacks, wants
        self.source_XD, self.g_XD, self.h_MF, self.weight_M = source_XD, g_XD, h_MF, weight_M
        num_rows = sum(plan.trip.rows_A)
        self.drow_XD = source_XD.new_empty(num_rows + plan.trip.room, source_XD.shape[1]) if wants.x else None
        self.dweight_M = None if weight_M is None else torch.empty_like(weight_M)
        weights = [weight for stack in stacks for weight in stack]
        self.grads = [
            torch.empty_like(weight) if wanted and weight is not None else None
            for weight, wanted in zip(weights, wants.weights, strict=True)
        ]

    def run(self) -> None:
        for which, batch in self.plan.batches(self.stacks):
            self._batch(which, batch)
        rows_A = self.plan.trip.rows_A
        for index, grad in enumerate(self.grads):
            if grad is not None:
                first = 0 if index < len(Stack._fields) else len(self.stacks[0].up)
                for expert, rows in enumerate(rows_A[first : first + len(grad)]):
                    if not rows:
                        grad[expert].zero_()

    def _batch(self, which: int, batch: Batch) -> None:
        trip, stack, rows = self.plan.trip, self.stacks[which], batch.rows
        first = which * len(Stack._fields)
        up, down, up_bias, down_bias = self.wants.weights[first : first + len(Stack._fields)]
        g_MD = _pick(self.g_XD, trip, rows)
        da_MF = batch.times_back(g_MD, stack.down, None)
        a_MF, pull = linearise(self.plan.activation, self.h_MF[rows])
        if self.weight_M is not None and self.dweight_M is not None:
            weight_M1 = self.weight_M[rows, None]
            dweight_M = _dot(da_MF, a_MF)
            if stack.down_bias is not None:
                dweight_M += _dot(g_MD, batch.bias_of(stack.down_bias))
            self.dweight_M[rows] = dweight_M
            da_MF.mul_(weight_M1)
            if down:
                a_MF = torch.mul(a_MF, weight_M1, out=torch.empty_like(a_MF))
        if down:
            self._put(first + 1, batch.dweight(g_MD, a_MF, self._at(first + 1)))
        if down_bias:
            if self.weight_M is not None:
                g_MD = g_MD * self.weight_M[rows, None]
            self._put(first + 3, batch.dbias(g_MD.to(stack.down.dtype), self._at(first + 3)))
        if not (up or up_bias or self.wants.x):
            return
        dh_MF = pull(da_MF)
        if up:
            self._put(first, batch.dweight(dh_MF, _pick(self.source_XD, trip, rows), self._at(first)))
        if up_bias:
            self._put(first + 2, batch.dbias(dh_MF, self._at(first + 2)))
        if self.drow_XD is not None:
            batch.times_back(dh_MF, stack.up, self.drow_XD[rows])

    def _at(self, index: int) -> Tensor:
        grad = self.grads[index]
        assert grad is not None
        return grad

    def _put(self, index: int, grad: Tensor) -> None:
        self.grads[index] = grad


def _pick(source_XD: Tensor, trip: Trip, rows: slice) -> Tensor:
    return source_XD[rows] if trip.index_M is None else source_XD.index_select(0, trip.index_M[rows])


def _dot(left_MD: Tensor, right_MD: Tensor) -> Tensor:
    """<left_m, right_m>, added in fp32 or better."""
    return (left_MD * right_MD).sum(dim=-1, dtype=at_least_fp32(left_MD.dtype))


def _wide(weight_N: Tensor, row_MD: Tensor) -> Tensor:
    return weight_N.to(at_least_fp32(row_MD.dtype))


def _stacks(weights: Sequence[Tensor | None]) -> tuple[Stack, Stack]:
    count = len(Stack._fields)
    return Stack(*weights[:count]), Stack(*weights[count:])  # type: ignore[arg-type]
