"""Which tokens a step takes: continuous batching, decided from values alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from scripts.serving.requests import Request


@dataclass(frozen=True, kw_only=True)
class Running:
    """A request in a slot. answer: what was said so far. done: bytes of prompt and answer that are in the cache.
    first: when the first byte of the answer was there, None before."""

    request: Request
    slot: int
    done: int = 0
    answer: bytes = b""
    first: float | None = None

    @property
    def text(self) -> bytes:
        return self.request.prompt + self.answer

    @property
    def left(self) -> int:
        """Bytes to read before the next can be said: 1 while it answers, the prompt's rest before."""
        return len(self.text) - self.done

    def advanced(self, taken: int, said: int, now: float) -> Running:
        """taken: bytes that were read. said: the byte that follows them; it counts once all were read."""
        if taken < self.left:
            return replace(self, done=self.done + taken)
        first = now if self.first is None else self.first
        return replace(self, done=self.done + taken, answer=self.answer + bytes([said]), first=first)


class Turn(NamedTuple):
    """A step: who runs, how many bytes each of them reads, and who must wait."""

    running: tuple[Running, ...]
    take_B: tuple[int, ...]
    waiting: tuple[Request, ...]

    @property
    def tokens(self) -> int:
        return sum(self.take_B)


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """Requests take a free slot in the order they came, and leave it in the step that ends them.

    slots: sequences at a time. tokens: bytes a step reads at most. Those that answer come first, a byte each; what is
    left reads prompts, the oldest first, in as many steps as it takes.
    """

    slots: int = 8
    tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= self.tokens:
            raise ValueError(
                f"{self.slots} slots and {self.tokens} tokens a step; use at least 1 slot, and a token for each"
            )

    def __call__(self, running: Sequence[Running], waiting: Sequence[Request]) -> Turn:
        taken = {each.slot for each in running}
        free = [slot for slot in range(self.slots) if slot not in taken]
        fresh = [Running(request=request, slot=slot) for request, slot in zip(waiting, free, strict=False)]
        admitted = (*running, *fresh)
        room = self.tokens - sum(each.left == 1 for each in admitted)
        take_B = []
        for each in admitted:
            take_B.append(1 if each.left == 1 else min(each.left, room))
            room -= 0 if each.left == 1 else take_B[-1]
        return Turn(admitted, tuple(take_B), tuple(waiting[len(fresh) :]))
