"""Visit: tokens go to experts and results come home, in one step of autograd.

One step, so that neither the K rows of each token nor its K results are kept, or even made where a gather will do: from
forward to backward live the tokens, the guests' rows, and h, what goes into the activations. The weight of a choice is
applied once on the way forward, in fp32, where results are added; on the way back on the narrow side, to what lies
between an expert's two matrices. Its own gradient is found there too, so results need not be kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.activation import Activation
from moe.comm import unseen
from moe.compute import Compute
from moe.dispatch import add_rows
from moe.guests import Guests, Nobody, Stacks
from moe.stack import Back, Batch, Rows, Stack
from moe.trip import Add, Trip
from routing import at_least_fp32, outside_autocast


def visit(
    x_TD: Tensor,
    weight_N: Tensor | None,
    trip: Trip,
    own: Stack,
    guests: Guests,
    compute: Compute,
    activation: Activation,
) -> Tensor:
    """y_t = sum over the choices n = (t, e) of weight_n expert_e(x_t). The experts here are `own`, then the guests."""
    plan = _Plan(trip, guests, compute, activation, torch.is_grad_enabled())
    y_TD: Tensor = _Visit.apply(plan, x_TD, weight_N, *own)  # type: ignore[no-untyped-call]
    return y_TD


class _Plan(NamedTuple):
    trip: Trip
    guests: Guests
    compute: Compute
    activation: Activation
    keep: bool

    @property
    def add(self) -> Add:
        add: Add = getattr(self.compute, "add", add_rows)
        return add

    def batches_at_home(self, own: Stack) -> Sequence[Batch]:
        """A rank without experts asks, too: a compute that refuses this type must do so on every rank."""
        return self.compute(self.trip.rows_A[: len(own.up)], own, self.activation, 0)

    def batches_of_guests(self, own: Stack, visiting: Stack) -> Sequence[Batch]:
        home, rows_A = self.trip.rows_A[: len(own.up)], self.trip.rows_A[len(own.up) :]
        return self.compute(rows_A, visiting, self.activation, sum(home)) if rows_A else ()

    def send(self, own: Stack) -> Stacks:
        """The guests set out."""
        return (
            self.guests.fetch([weight for weight in own if weight is not None])
            if self.guests.any
            else Nobody().fetch(())
        )


class _Visit(torch.autograd.Function):
    """forward:   h_m = up_e x_m + b_e,  a_m = act(h_m),  y_t = sum over m of t of w_m (down_e a_m + c_e)
    backward:  g_m = dy_t,  s_m = down_e^T g_m,  dh_m = act'(h_m)^T w_m s_m
               dw_m = <s_m, a_m> + <g_m, c_e>,  dx_t = sum over m of t of up_e^T dh_m
               dup_e = sum of dh_m x_m^T,  db_e = sum of dh_m,  ddown_e = sum of g_m (w_m a_m)^T,  dc_e = sum of w_m g_m
               and of an expert that visited: its gradient at home + what its borrowers found

    While guests are on the way the experts at home compute; so do they while the guests' gradients go home.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x_TD: Tensor, weight_N: Tensor | None, *weights: Tensor | None) -> Tensor:
        trip, own = plan.trip, _stack(weights)
        with unseen(), outside_autocast(x_TD):  # it writes into memory of its own, here and in messages
            source_XD, _ = trip.go(x_TD, None)
            result_XD, h_MF, visiting = _forward(plan, source_XD, own)
            trip.come(result_XD, None)
            ctx.plan = plan
            if plan.keep:
                stay = visiting if plan.guests.keeps else ()
                ctx.save_for_backward(source_XD, h_MF, weight_N, *weights, *stay)
            return trip.total(result_XD, None if weight_N is None else _wide(weight_N, x_TD), plan.add)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        source_XD, h_MF, weight_N, *weights = ctx.saved_tensors
        trip: Trip = ctx.plan.trip
        own, stayed = _stack(weights[: len(Stack._fields)]), weights[len(Stack._fields) :]
        _, x, weight, *others = ctx.needs_input_grad
        wants = _Wants(x, weight, tuple(others))
        with outside_autocast(dy_TD):
            g_XD, weight_M = trip.go(dy_TD.contiguous(), None if weight_N is None else _wide(weight_N, dy_TD))
            back = _Backward(ctx.plan, wants, source_XD, g_XD, h_MF, weight_M)
            grads = back.run(own, _stack(stayed) if stayed else None)
            if not (wants.x or wants.weight):
                return None, None, None, *grads
            # The gradient of the weight travels with that of x wherever x wants one: its own wish is not every rank's.
            dweight_N = trip.come(back.drow_XD, back.dweight_M)
            dx_TD = None if back.drow_XD is None else trip.total(back.drow_XD, None, ctx.plan.add)
            dweight_N = None if dweight_N is None or not wants.weight else dweight_N.to(weight_N.dtype)
            return None, dx_TD, dweight_N, *grads


class _Wants(NamedTuple):
    x: bool
    weight: bool
    weights: tuple[bool, ...]


def _forward(plan: _Plan, source_XD: Tensor, own: Stack) -> tuple[Tensor, Tensor | None, Stack]:
    """-> results with room, h if it is to be kept, the guests. A lone batch's own tensors are taken as they are."""
    trip, (fan_hidden, dim) = plan.trip, (own.up.shape[1], own.down.shape[1])
    coming, home = plan.send(own), plan.batches_at_home(own)
    lone, num_rows = len(home) == 1 and not plan.guests.guests, sum(trip.rows_A)
    result_XD = None if lone and not trip.room else source_XD.new_empty(num_rows + trip.room, dim)
    h_MF = source_XD.new_empty(num_rows, fan_hidden) if plan.keep and not lone else None

    x = Rows(source_XD, trip.index_M)

    def run(batch: Batch, stack: Stack) -> tuple[Tensor | None, Tensor]:
        at = batch.rows
        h, result = None if h_MF is None else h_MF[at], None if result_XD is None else result_XD[at]
        return batch.forward(x, stack, plan.activation, h_MF=h, result_MD=result, keep=plan.keep)

    result = h = None
    for batch in home:
        h, result = run(batch, own)
    visiting = _guests_of(own, coming)
    for batch in plan.batches_of_guests(own, visiting):
        run(batch, visiting)
    result_XD = result if result_XD is None else result_XD
    assert result_XD is not None
    return result_XD, (h if h_MF is None else h_MF) if plan.keep else None, visiting


def _guests_of(own: Stack, coming: Stacks) -> Stack:
    """The guests, as soon as they are here, in the layout of the experts at home."""
    arrived = iter(coming.wait())
    return Stack(*(None if weight is None else next(arrived, weight[:0]) for weight in own))  # type: ignore[arg-type]


class _Backward:
    """The gradients of all that took part, batch by batch, each written where it belongs."""

    def __init__(
        self,
        plan: _Plan,
        wants: _Wants,
        source_XD: Tensor,
        g_XD: Tensor,
        h_MF: Tensor,
        weight_M: Tensor | None,
    ) -> None:
        self.plan, self.wants = plan, wants
        self.x, self.g = Rows(source_XD, plan.trip.index_M), Rows(g_XD, plan.trip.index_M)
        self.h_MF, self.weight_M = h_MF, weight_M
        num_rows = sum(plan.trip.rows_A)
        self.drow_XD = source_XD.new_empty(num_rows + plan.trip.room, source_XD.shape[1]) if wants.x else None
        self.dweight_M = None if weight_M is None else torch.empty_like(weight_M)

    def run(self, own: Stack, visiting: Stack | None) -> list[Tensor | None]:
        """visiting: the guests, if they stayed. -> the gradients of the experts at home"""
        guests, returns = self.plan.guests, self.plan.guests.any and any(self.wants.weights)
        coming = self.plan.send(own) if visiting is None else None
        grads = None if coming is None else self._at_home(own)  # while the guests come again
        visiting = _guests_of(own, coming) if coming is not None else visiting
        assert visiting is not None
        theirs = self._stack(visiting, self.plan.batches_of_guests(own, visiting), self.plan.trip.rows_A[len(own.up) :])
        home = guests.give_back([grad for grad in theirs if grad is not None]) if returns else None
        grads = self._at_home(own) if grads is None else grads  # while the guests' gradients go home
        if home is not None:
            for grad, came in zip((grad for grad in grads if grad is not None), home.wait(), strict=True):
                guests.add(grad, came)
        return grads

    def _at_home(self, own: Stack) -> list[Tensor | None]:
        return self._stack(own, self.plan.batches_at_home(own), self.plan.trip.rows_A[: len(own.up)])

    def _stack(self, stack: Stack, batches: Sequence[Batch], rows_A: Sequence[int]) -> list[Tensor | None]:
        back = Back(
            x=self.x,
            g=self.g,
            h_MF=self.h_MF,
            weight_M=self.weight_M,
            dweight_M=self.dweight_M,
            drow_XD=self.drow_XD,
            grads=[
                torch.empty_like(weight) if wanted and weight is not None else None
                for weight, wanted in zip(stack, self.wants.weights, strict=True)
            ],
        )
        for batch in batches:
            batch.backward(back, stack, self.plan.activation)
        for grad in back.grads:
            if grad is not None:
                for expert, rows in enumerate(rows_A):
                    if not rows:
                        grad[expert].zero_()
        return back.grads


def _wide(weight_N: Tensor, row_MD: Tensor) -> Tensor:
    return weight_N.to(at_least_fp32(row_MD.dtype))


def _stack(weights: Sequence[Tensor | None]) -> Stack:
    return Stack(*weights)  # type: ignore[arg-type]
