"""Replay: what each rank of a group would compute, on one device, one virtual rank after the other.

Each has its exact buffers: the rows its experts and guests are assigned, the weights of both. Measured are compute and
memory. What travels is counted, and its time modelled by latency and bandwidth. One device that plays every part in
turn says how long each rank would be busy; it does not say how fast they are together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe import Experts
from moe.guests import Here, Nobody
from moe.stack import Stack
from moe.trip import Stay
from placement import INFINIBAND, NVLINK, Placement, Topology
from routing import Assignment
from scripts.bench.clock import Clock, reason
from scripts.bench.loads import LOADS, Case
from scripts.bench.published import Shape, experts_of

NODE = 8


@dataclass(frozen=True, kw_only=True)
class Played:
    """One assignment. seconds, peaks, computed: of the ranks that were played; rows: of all ranks. failed: why some
    were not."""

    ranks: int
    rows_R: NDArray[np.int64]
    seconds: Sequence[float]
    peaks: Sequence[float]
    computed: int
    loans: int
    travel: float
    failed: str


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """Guests that are here already, and whose gradients are made and let go."""

    visiting: Sequence[Tensor]
    guests: int
    any: bool = True
    keeps: bool = True

    def fetch(self, weights: Sequence[Tensor]) -> Here:
        return Here(list(self.visiting))

    def give_back(self, grads: Sequence[Tensor]) -> Here:
        return Here(list(grads))

    def add(self, grad: Tensor, came: Tensor) -> None:
        pass


def counts(load: str, shape: Shape, ranks: int, tokens: int) -> NDArray[np.int64]:
    """count_RE of one step."""
    case = Case(ranks=ranks, experts=shape.experts, top_k=shape.top_k, tokens=tokens)
    drawn = [LOADS[load].choices(case, rank)[0].flatten() for rank in range(ranks)]
    return np.stack([np.bincount(expert_N.numpy(), minlength=shape.experts) for expert_N in drawn])


def in_order(shape: Shape, ranks: int) -> Placement:
    """Rank r has the r-th run of experts, as the loads have it."""
    return Placement(expert_RS=np.arange(shape.experts).reshape(ranks, -1))


class Stage:
    """A device that plays the ranks of one shape: weights, as many as the rank with most guests needs."""

    def __init__(self, shape: Shape, ranks: int, guests: int, clock: Clock, dtype: torch.dtype) -> None:
        self.shape, self.clock, self.own = shape, clock, shape.experts // ranks
        self.experts: Experts = experts_of(shape, self.own + guests, clock.device, dtype).requires_grad_(False)

    def play(self, assignment: Assignment, placement: Placement, seconds: float, *, backward: bool) -> Played:
        """As many ranks as the seconds allow: the busiest and the idlest always, then others, evenly spread."""
        ranks, load_R = placement.ranks, assignment.load_R
        order = list(dict.fromkeys([int(load_R.argmax()), int(load_R.argmin()), *spread(ranks)]))
        loans = assignment.loans(placement)
        taken: list[float] = []
        peaks: list[float] = []
        computed = 0
        failed, end = "", self.clock.left - seconds
        for rank in order:
            if len(taken) >= 2 and self.clock.left < max(end, 0.0):
                break
            guests = [loan.expert for loan in loans if loan.borrower == rank]
            rows_A = assignment.quota_RE[rank, [*placement.experts_of(rank), *guests]].tolist()
            try:
                run = self._rank(rows_A, backward)
                peaks.append(self.clock.peak(run) + len(guests) * self._expert_bytes())
                computed += sum(rows_A)
                taken.append(min(self.clock.once(run) for _ in range(2)))
            except RuntimeError as error:
                failed = f"rank of {load_R[rank]} rows: {reason(error)}"
            self.clock.tidy()
        travel = travel_seconds(assignment, placement, self.shape, self._expert_bytes(), backward=backward)
        return Played(
            ranks=ranks,
            rows_R=load_R,
            seconds=taken,
            peaks=peaks,
            computed=computed,
            loans=len(loans),
            travel=travel,
            failed=failed,
        )

    def _rank(self, rows_A: list[int], backward: bool) -> Callable[[], object]:
        """Forward, or forward and backward, of the rows a rank computes, sorted by expert as they arrive."""
        rows, own = sum(rows_A), self._stack(0, self.own)
        device, dtype = self.experts.up.device, self.experts.up.dtype
        away = self._stack(self.own, len(rows_A))
        visiting = [weight for weight in away if weight is not None]
        guests = Arrived(visiting=visiting, guests=len(rows_A) - self.own) if len(rows_A) > self.own else Nobody()
        weights = [nn.Parameter(weight) for weight in own if weight is not None] if backward else []
        stack = Stack(weights[0], weights[1], None, None) if backward else own

        def run() -> None:
            x_MD = torch.randn(rows, self.shape.dim, device=device, dtype=dtype, requires_grad=backward)
            weight_M = torch.rand(rows, device=device, requires_grad=backward)
            with torch.set_grad_enabled(backward):
                y_MD = self.experts(x_MD, weight_M, Stay(rows_A=tuple(rows_A)), stack, guests)
            if backward:
                torch.autograd.grad(y_MD, [x_MD, weight_M, *weights], x_MD.detach())

        return partial(run)

    def _stack(self, start: int, stop: int) -> Stack:
        return Stack(self.experts.up.detach()[start:stop], self.experts.down.detach()[start:stop], None, None)

    def _expert_bytes(self) -> int:
        return sum(weight[0].numel() * weight.element_size() for weight in self.experts.parameters())


def spread(ranks: int) -> list[int]:
    """All ranks, so that any first few lie evenly: 0, the middle, the quarters, ..."""
    bits = max(ranks - 1, 1).bit_length()
    turned = [int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits)]
    return [rank for rank in turned if rank < ranks]


def travel_seconds(
    assignment: Assignment, placement: Placement, shape: Shape, expert_bytes: int, *, backward: bool
) -> float:
    """MODELLED, nothing was sent: of the rank that is longest at it, a latency for each peer and bytes over bandwidth.

    Rows go out and come home, with backward once more; a visit takes an expert, with backward its gradient back. NVLINK
    within nodes of 8 ranks, INFINIBAND between them, both as in placement; the longer of sending and receiving counts.
    """
    ranks = placement.ranks
    topology = Topology.fitting(num_experts=shape.experts, ranks=ranks, ranks_per_node=min(NODE, ranks))
    node_R = np.array(topology.node_R)
    byte_RR = assignment.flow_RRE().sum(axis=2) * (shape.dim * 2.0)
    visit_RR = np.zeros((ranks, ranks))
    for loan in assignment.loans(placement):
        visit_RR[loan.lender, loan.borrower] += expert_bytes
    within_RR = node_R[:, None] == node_R
    longest = 0.0
    for moved_RR in (byte_RR, byte_RR.T, visit_RR):  # out, home; who has sent gets as much back in backward
        cost_RR = np.where(
            within_RR,
            NVLINK.latency * (moved_RR > 0) + moved_RR / NVLINK.bandwidth,
            INFINIBAND.latency * (moved_RR > 0) + moved_RR / INFINIBAND.bandwidth,
        )
        np.fill_diagonal(cost_RR, 0.0)
        longest += float(max(cost_RR.sum(axis=0).max(), cost_RR.sum(axis=1).max()))
    return longest * (2 if backward else 1)
