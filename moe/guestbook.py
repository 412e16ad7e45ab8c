"""Guestbook: experts that stay with other ranks from step to step, and so need not travel again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe.comm import Lending, Peers, visitors
from moe.guests import Guests, Here, Stacks
from routing import Loan

if TYPE_CHECKING:
    from moe.layer import MoE


class Guestbook:
    """Who still visits whom from earlier steps, by which no expert travels twice. Alike on every rank.

    most: guests that a rank keeps of a layer; those not needed for longest leave first. Weights must not change while
    it is open: whoever keeps a guest would compute with what it was.
    """

    def __init__(self, most: int, peers: Peers) -> None:
        self.most, self.peers = most, peers
        self._held_R: list[dict[int, None]] = [{} for _ in range(peers.size)]
        self._guests: dict[int, list[Tensor]] = {}
        self._version: int | None = None
        self._dtype: torch.dtype | None = None

    def problem(self, weights: Sequence[Tensor | None]) -> str | None:
        """What is wrong with this rank's weights, if anything."""
        version = sum(w._version for w in weights if w is not None and not w.is_inference())
        if self._version is None:
            self._version = version
        if version != self._version:
            return "an expert's weights changed inside lasting_visits(model); leave it before the optimiser steps"
        return None

    def clear(self) -> None:
        """All leave: experts have moved."""
        self._held_R = [{} for _ in range(self.peers.size)]
        self._guests, self._version = {}, None

    def admit(self, loans: Sequence[Loan], ids: Sequence[int], dtype: torch.dtype) -> Guests:
        """dtype: in which the experts compute. Guests that came in another do not stay."""
        if dtype != self._dtype:
            self._held_R, self._guests, self._dtype = [{} for _ in range(self.peers.size)], {}, dtype
        new = [loan for loan in loans if loan.expert not in self._held_R[loan.borrower]]
        for rank, held in enumerate(self._held_R):
            for expert in visitors(loans, rank):
                held.pop(expert, None)
                held[expert] = None
            for expert in list(held)[: max(0, len(held) - self.most)]:
                del held[expert]
        whole = Lending.of(loans, ids, self.peers)
        mine = tuple(visitors(loans, self.peers.rank))
        return _Lasting(whole, Lending.of(new, ids, self.peers), mine, tuple(visitors(new, self.peers.rank)), self)

    def join(
        self, mine: Sequence[int], new: Sequence[int], arrived: Sequence[Tensor], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """The guests of this step, those that stayed and those that came; all that may stay on do."""
        here = self._guests | {expert: [stack[i] for stack in arrived] for i, expert in enumerate(new)}
        held = self._held_R[self.peers.rank]
        # Of those that came each is a part of one message, which would stay as a whole with any of them.
        self._guests = {
            expert: [part.clone() for part in here[expert]] if expert in new else here[expert]
            for expert in held
            if expert in here
        }
        if list(mine) == list(new) and arrived:
            return list(arrived)
        parts = [[here[expert][index] for expert in mine] for index in range(len(like))]
        return [torch.stack(part) if part else weight[:0] for part, weight in zip(parts, like, strict=True)]


@dataclass(frozen=True)
class _Lasting:
    """whole: all loans of the step, by which gradients go home. new: those that must travel."""

    whole: Lending
    new: Lending
    mine: tuple[int, ...]
    arriving: tuple[int, ...]
    book: Guestbook
    keeps: bool = True

    @property
    def guests(self) -> int:
        return self.whole.guests

    @property
    def any(self) -> bool:
        return self.whole.any

    def fetch(self, weights: Sequence[Tensor]) -> Stacks:
        coming = self.new.fetch(weights) if self.new.any else Here([])
        return _Joined(self, coming, [weight[:0] for weight in weights])

    def give_back(self, grads: Sequence[Tensor]) -> Stacks:
        return self.whole.give_back(grads)

    def add(self, grad: Tensor, came: Tensor) -> None:
        self.whole.add(grad, came)


@dataclass(frozen=True)
class _Joined:
    step: _Lasting
    coming: Stacks
    like: Sequence[Tensor]

    def wait(self) -> list[Tensor]:
        return self.step.book.join(self.step.mine, self.step.arriving, self.coming.wait(), self.like)


@contextmanager
def lasting_visits(model: nn.Module, most: int = 8) -> Iterator[None]:
    """Guests stay for as long as this is open, `most` of them on each rank for each layer, and do not travel again.

    For the micro-batches of one optimiser step, or for inference. Every rank must open it; their gradients go home with
    every backward all the same. The optimiser steps after it is closed: changed weights are one error on every rank.
    """
    if most < 1:
        raise ValueError(f"most={most}; let at least one guest stay, or do not open lasting_visits")
    layers: list[MoE] = [module for module in model.modules() if hasattr(module, "guestbook")]  # type: ignore[misc]
    if not layers:
        raise ValueError("the model has no MoE layer whose guests could stay")
    before = [layer.guestbook for layer in layers]
    for layer in layers:
        layer.guestbook = Guestbook(most, layer.peers)
    try:
        yield
    finally:
        for layer, book in zip(layers, before, strict=True):
            layer.guestbook = book
