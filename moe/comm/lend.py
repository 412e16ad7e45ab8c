"""Weights that visit other ranks, and gradients that come home.

Lending: an expert's weights go to the ranks that borrow it for this step; the gradients they compute come back and are
added, in fp32 or better, to the one computed at home. tie: where an expert has copies, each copy's gradient becomes the
sum over all of them, so that copies which start equal stay equal under an optimiser that steps entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.comm.exchange import Arriving, exchange_later
from moe.comm.group import Peers
from placement import Placement
from routing import Loan, at_least_fp32


class _Trip(NamedTuple):
    """Which slots of this rank travel, in the order they leave, and how many go to and come from each rank."""

    slots: tuple[int, ...]
    send_R: tuple[int, ...]
    recv_R: tuple[int, ...]
    peers: Peers


class Coming:
    """Stacks on their way, several packed in one message. wait() -> the stacks."""

    def __init__(self, packed: Sequence[tuple[Arriving, Sequence[int], Sequence[torch.Size]]]) -> None:
        """Of each message: the rows, which stacks they hold, and the shapes of their rows."""
        self._packed = packed

    def wait(self) -> list[Tensor]:
        arrived: dict[int, Tensor] = {}
        for message, which, shapes in self._packed:
            parts = torch.split(message.wait(), [shape.numel() for shape in shapes], dim=1)
            arrived |= {
                index: part.view(len(part), *shape) for index, part, shape in zip(which, parts, shapes, strict=True)
            }
        return [arrived[index] for index in sorted(arrived)]


@dataclass(frozen=True)
class Lending:
    """The loans of one step as one rank sees them. All ranks must make it of the same loans.

    Guests are ordered by lender, then expert, as in `visitors`. guests: how many. any: does anybody lend? Then all
    ranks take part, whoever does not has nothing to send.
    """

    trip: _Trip
    any: bool

    @classmethod
    def of(cls, loans: Sequence[Loan], ids: Sequence[int], peers: Peers) -> Self:
        """ids: the experts in this rank's slots."""
        slot_of = {expert: slot for slot, expert in enumerate(ids)}
        out = sorted((loan.borrower, loan.expert) for loan in loans if loan.lender == peers.rank)
        trip = _Trip(
            slots=tuple(slot_of[expert] for _, expert in out),
            send_R=_tally((borrower for borrower, _ in out), peers.size),
            recv_R=_tally((loan.lender for loan in loans if loan.borrower == peers.rank), peers.size),
            peers=peers,
        )
        return cls(trip=trip, any=len(loans) > 0)

    @property
    def guests(self) -> int:
        return sum(self.trip.recv_R)

    def fetch(self, weights: Sequence[Tensor]) -> Coming:
        """weights: this rank's experts, [slots, ...] each. They start for their borrowers, and the guests' come."""
        return _travel(weights, self.trip.slots, self.trip)

    def give_back(self, grads: Sequence[Tensor]) -> Coming:
        """grads: the guests', [guests, ...] each. They start for home, and those of this rank's experts come."""
        back = self.trip._replace(send_R=self.trip.recv_R, recv_R=self.trip.send_R)
        return _travel(grads, range(self.guests), back)

    def add(self, grad: Tensor, came: Tensor) -> None:
        """To the gradient of each expert that was lent, in place, what came home for it."""
        _add_to_slots(grad, self.trip.slots, came)


def visitors(loans: Sequence[Loan], rank: int) -> list[int]:
    """The experts that visit a rank, in the order in which `lend` delivers them."""
    return [expert for _, expert in sorted((loan.lender, loan.expert) for loan in loans if loan.borrower == rank)]


def tie(weights: Sequence[Tensor], ids: Sequence[int], placement: Placement, peers: Peers) -> list[Tensor]:
    """The same weights, of the experts ids; in backward, every copy of an expert gets the gradient of all copies."""
    if placement.slots == placement.num_experts or peers.group is None:
        return list(weights)
    shared = [(rank, int(e)) for rank in range(peers.size) for e in placement.experts_of(rank) if rank != peers.rank]
    slot_of = {expert: slot for slot, expert in enumerate(ids)}
    mine = set(placement.experts_of(peers.rank).tolist())
    out = sorted((rank, expert) for rank, expert in shared if expert in mine)
    splits = _tally((rank for rank, _ in out), peers.size)
    trip = _Trip(slots=tuple(slot_of[expert] for _, expert in out), send_R=splits, recv_R=splits, peers=peers)
    return list(_Tie.apply(trip, *weights))  # type: ignore[no-untyped-call]


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
        others = _travel(own, trip.slots, trip).wait()
        total = [grad.clone() for grad in own]
        for grad, more in zip(total, others, strict=True):
            _add_to_slots(grad, trip.slots, more, before)
        return None, *total


def _travel(stacks: Sequence[Tensor], slots: Sequence[int], trip: _Trip) -> Coming:
    """These slots of several stacks to the same places, in one message for each type, each slot copied once."""
    packed = []
    for dtype in dict.fromkeys(stack.dtype for stack in stacks):
        which = [index for index, stack in enumerate(stacks) if stack.dtype == dtype]
        shapes = [stacks[index].shape[1:] for index in which]
        width = sum(shape.numel() for shape in shapes)
        parts = [stacks[index][slot].reshape(-1) for slot in slots for index in which]
        rows = torch.cat(parts).view(-1, width) if parts else stacks[which[0]].new_empty(0, width)
        packed.append((exchange_later(rows, trip.send_R, trip.recv_R, trip.peers), which, shapes))
    return Coming(packed)


def _add_to_slots(grad: Tensor, slots: tuple[int, ...], more: Tensor, before: int = 0) -> None:
    """grad[slot] += what came for it, in fp32 or better, rounded once. The first `before` rows come before its own."""
    dtype = at_least_fp32(grad.dtype)
    if dtype == grad.dtype and not before:
        for slot, term in zip(slots, more, strict=True):
            grad[slot].add_(term)
        return
    for touched in dict.fromkeys(slots):
        came = [index for index, slot in enumerate(slots) if slot == touched]
        terms = [*(more[i] for i in came if i < before), grad[touched], *(more[i] for i in came if i >= before)]
        total = terms[0].to(dtype, copy=True)
        for term in terms[1:]:
            total += term
        grad[touched] = total


def _tally(ranks: Any, size: int) -> tuple[int, ...]:
    tally = [0] * size
    for rank in ranks:
        tally[rank] += 1
    return tuple(tally)
