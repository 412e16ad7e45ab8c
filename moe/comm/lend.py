"""Weights that visit other ranks, and gradients that come home.

lend: an expert's weights go to the ranks that borrow it for this step; the gradients they compute come back and are
added, in fp32 or better, to the one computed at home. tie: where an expert has copies, each copy's gradient becomes the
sum over all of them, so that copies which start equal stay equal under any optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.comm.exchange import exchange
from moe.comm.group import Peers
from placement import Placement
from routing import Loan, at_least_fp32


class _Trip(NamedTuple):
    """Which slots of this rank travel, in the order they leave, and how many go to and come from each rank."""

    slots: tuple[int, ...]
    send_R: tuple[int, ...]
    recv_R: tuple[int, ...]
    peers: Peers


def lend(
    weights: Sequence[Tensor], ids: Sequence[int], loans: Sequence[Loan], peers: Peers
) -> tuple[list[Tensor], list[Tensor]]:
    """weights: this rank's experts ids, [slots, ...] each. -> the same, and those of the experts that visit this rank.

    The visitors are ordered by lender, then expert, as in `visitors`. All ranks must give the same loans. The returned
    own weights must be used in place of the given ones, for the gradients that come home to reach them.
    """
    if not loans:
        return list(weights), [weight.detach()[:0] for weight in weights]
    slot_of = {expert: slot for slot, expert in enumerate(ids)}
    out = sorted((loan.borrower, loan.expert) for loan in loans if loan.lender == peers.rank)
    trip = _Trip(
        slots=tuple(slot_of[expert] for _, expert in out),
        send_R=_tally((borrower for borrower, _ in out), peers.size),
        recv_R=_tally((loan.lender for loan in loans if loan.borrower == peers.rank), peers.size),
        peers=peers,
    )
    dtypes = tuple(_travels_as(weight) for weight in weights)
    both = _Lend.apply(trip, dtypes, *weights)  # type: ignore[no-untyped-call]
    return list(both[: len(weights)]), list(both[len(weights) :])


def visitors(loans: Sequence[Loan], rank: int) -> list[int]:
    """The experts that visit a rank, in the order in which `lend` delivers them."""
    return [expert for _, expert in sorted((loan.lender, loan.expert) for loan in loans if loan.borrower == rank)]


def tie(weights: Sequence[Tensor], ids: Sequence[int], placement: Placement, peers: Peers) -> list[Tensor]:
    """The same weights; in backward, every copy of an expert gets the gradient of all copies."""
    if placement.slots == placement.num_experts or peers.group is None:
        return list(weights)
    shared = [(rank, int(e)) for rank in range(peers.size) for e in placement.experts_of(rank) if rank != peers.rank]
    slot_of = {expert: slot for slot, expert in enumerate(ids)}
    mine = set(placement.experts_of(peers.rank).tolist())
    out = sorted((rank, expert) for rank, expert in shared if expert in mine)
    splits = _tally((rank for rank, _ in out), peers.size)
    trip = _Trip(slots=tuple(slot_of[expert] for _, expert in out), send_R=splits, recv_R=splits, peers=peers)
    return list(_Tie.apply(trip, *weights))  # type: ignore[no-untyped-call]


class _Lend(torch.autograd.Function):
    """forward:   own = W;  visiting_i = W of the rank that lends i
    backward:  dW_e = down_e + sum over the borrowers of e of dvisiting_e
    """

    @staticmethod
    def forward(ctx: Any, trip: _Trip, dtypes: tuple[torch.dtype, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        visiting = _travel([_pick(weight, trip.slots).to(dtype) for weight, dtype in zip(weights, dtypes)], trip)
        return (*(weight.view_as(weight) for weight in weights), *visiting)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: _Trip = ctx.trip
        own, visiting = grads[: len(grads) // 2], grads[len(grads) // 2 :]
        back = trip._replace(send_R=trip.recv_R, recv_R=trip.send_R)
        returned = _travel(visiting, back)
        return None, None, *(_add_to_slots(grad, trip.slots, more) for grad, more in zip(own, returned))


class _Tie(torch.autograd.Function):
    """forward:   own = W
    backward:  dW_e = sum over the ranks that hold e of their down_e, added in the order of the ranks
    """

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *own: Tensor) -> tuple[Tensor | None, ...]:
        trip: _Trip = ctx.trip
        before = sum(trip.recv_R[: trip.peers.rank])
        others = _travel([_pick(grad, trip.slots) for grad in own], trip)
        return None, *(_add_to_slots(grad, trip.slots, more, before) for grad, more in zip(own, others))


def _pick(weight: Tensor, slots: Sequence[int]) -> Tensor:
    """weight[slots], without an index tensor that would have to reach the device."""
    return torch.stack([weight[slot] for slot in slots]) if slots else weight[:0]


def _travel(stacks: Sequence[Tensor], trip: _Trip) -> list[Tensor]:
    """Several stacks of rows to the same places, in one message for each type. -> the stacks that arrive"""
    arrived: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(stack.dtype for stack in stacks):
        which = [index for index, stack in enumerate(stacks) if stack.dtype == dtype]
        widths = [stacks[index].shape[1:].numel() for index in which]
        packed = torch.cat([stacks[index].reshape(-1, width) for index, width in zip(which, widths)], dim=1)
        packed = exchange(packed, trip.send_R, trip.recv_R, trip.peers)
        for index, part in zip(which, torch.split(packed, widths, dim=1)):
            arrived[index] = part.reshape(len(part), *stacks[index].shape[1:])
    return [arrived[index] for index in range(len(stacks))]


def _add_to_slots(grad: Tensor, slots: tuple[int, ...], more: Tensor, before: int = 0) -> Tensor:
    """grad[slot] + what came for it, in fp32 or better, rounded once. The first `before` rows come before its own."""
    if not slots:
        return grad
    dtype = at_least_fp32(grad.dtype)
    grad = grad.clone()
    for touched in dict.fromkeys(slots):
        came = [index for index, slot in enumerate(slots) if slot == touched]
        terms = [*(more[i] for i in came if i < before), grad[touched], *(more[i] for i in came if i >= before)]
        total = terms[0].to(dtype, copy=True)
        for term in terms[1:]:
            total += term
        grad[touched] = total
    return grad


def _travels_as(weight: Tensor) -> torch.dtype:
    """Under autocast the visitors are used in its type, so they need not travel in a wider one."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _tally(ranks: Any, size: int) -> tuple[int, ...]:
    tally = [0] * size
    for rank in ranks:
        tally[rank] += 1
    return tuple(tally)
