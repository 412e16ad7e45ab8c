"""Guests: the experts that visit a rank for a step, and how long they stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe.comm import Lending


class Stacks(Protocol):
    """Stacked weights or gradients that may still be on their way."""

    def wait(self) -> list[Tensor]: ...


class Guests(Protocol):
    """The experts that visit this rank for a step, and this rank's that visit others."""

    @property
    def guests(self) -> int:
        """How many visit this rank."""

    @property
    def any(self) -> bool:
        """Does any expert visit any rank? Then all ranks take part."""

    @property
    def keeps(self) -> bool:
        """Do guests stay from forward to backward? Else they come again."""

    def fetch(self, weights: Sequence[Tensor]) -> Stacks:
        """weights: of the experts at home, [slots, ...] each. -> those of the guests, [guests, ...] each"""

    def give_back(self, grads: Sequence[Tensor]) -> Stacks:
        """grads: the guests'. -> those of this rank's experts that come home"""

    def add(self, grad: Tensor, came: Tensor) -> None:
        """To the gradient at home, in place, what came for it."""


@dataclass(frozen=True, kw_only=True)
class Nobody:
    """No expert visits any rank."""

    guests: int = 0
    any: bool = False
    keeps: bool = True

    def fetch(self, weights: Sequence[Tensor]) -> Stacks:
        return Here([])

    def give_back(self, grads: Sequence[Tensor]) -> Stacks:
        return Here([])

    def add(self, grad: Tensor, came: Tensor) -> None:
        raise AssertionError("nobody was away")


@dataclass(frozen=True, kw_only=True)
class KeepGuests:
    """Guests stay from forward to backward: one trip, and their weights are in memory for so long."""

    def __call__(self, lending: Lending) -> Guests:
        return _Visit(lending=lending, keeps=True)


@dataclass(frozen=True, kw_only=True)
class RefetchGuests:
    """Guests leave after forward and come again before backward: a second trip, and only one layer's are in memory.

    They travel while the experts at home compute.
    """

    def __call__(self, lending: Lending) -> Guests:
        return _Visit(lending=lending, keeps=False)


class Invite(Protocol):
    def __call__(self, lending: Lending) -> Guests: ...


@dataclass(frozen=True, kw_only=True)
class _Visit:
    lending: Lending
    keeps: bool

    @property
    def guests(self) -> int:
        return self.lending.guests

    @property
    def any(self) -> bool:
        return self.lending.any

    def fetch(self, weights: Sequence[Tensor]) -> Stacks:
        return self.lending.fetch(weights)

    def give_back(self, grads: Sequence[Tensor]) -> Stacks:
        return self.lending.give_back(grads)

    def add(self, grad: Tensor, came: Tensor) -> None:
        self.lending.add(grad, came)


@dataclass(frozen=True)
class Here:
    """Stacks that need not travel."""

    stacks: Sequence[Tensor]

    def wait(self) -> list[Tensor]:
        return list(self.stacks)
