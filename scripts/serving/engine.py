"""Engine: one rank's requests, a step at a time.

A step is proposed, then committed. Until then nothing has changed but places of the cache that nobody reads yet, so a
step in which a peer was lost can be proposed again, or its requests released and served elsewhere: greedy answers are
the same wherever they are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moe.comm import Peers
from scripts.model import Bytes
from scripts.serving.batch import Continuous, Running, Turn
from scripts.serving.cache import Spots
from scripts.serving.requests import Request


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A request that was served. first, last: when the first and the last byte of its answer were there."""

    request: Request
    text: bytes
    first: float
    last: float

    @property
    def wait(self) -> float:
        """Time to first token."""
        return self.first - self.request.arrival

    @property
    def pace(self) -> float:
        """Time for each token after the first."""
        return (self.last - self.first) / max(len(self.text) - 1, 1)


class Reading(NamedTuple):
    """The tokens of one rank's step, end to end. slot_T: of this rank's slots."""

    byte_T: NDArray[np.int64]
    slot_T: NDArray[np.int64]
    place_T: NDArray[np.int64]


class Path(Protocol):
    """How tokens go through the model: with all other ranks, in one call on each."""

    def __call__(self, reading: Reading) -> NDArray[np.int64]:
        """-> said_T, the byte that follows each token"""


class Ordinary:
    """Every token's sequence stays on this rank, and so does its cache; tokens visit experts and come home."""

    def __init__(self, model: Bytes, schedule: Continuous) -> None:
        self.model, self.cache = model.eval(), model.cache(schedule.slots)

    @torch.no_grad()
    def __call__(self, reading: Reading) -> NDArray[np.int64]:
        device = self.model.head.weight.device
        byte_T, slot_T, place_T = torch.from_numpy(np.stack(reading)).to(device)
        said_T = self.model.extend(byte_T, Spots(slot_T, place_T), self.cache).argmax(dim=-1)
        said: NDArray[np.int64] = said_T.cpu().numpy()
        return said


class Proposal(NamedTuple):
    """What a step would make true. said_B: the byte that follows what each running request has read."""

    turn: Turn
    said_B: tuple[int, ...]


class Engine:
    """running, waiting: this rank's requests. All ranks must propose together, with requests or without."""

    def __init__(self, path: Path, schedule: Continuous, places: int) -> None:
        self.path, self.schedule, self.places = path, schedule, places
        self.running: tuple[Running, ...] = ()
        self.waiting: tuple[Request, ...] = ()

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def submit(self, requests: Iterable[Request]) -> None:
        """Requests are served in the order in which they come here."""
        for request in requests:
            require_room(request, self.places)
            self.waiting += (request,)

    def propose(self) -> Proposal:
        turn = self.schedule(self.running, self.waiting)
        said_T = self.path(reading_of(turn))
        end_B = np.cumsum(turn.take_B, dtype=np.int64)
        said_B = tuple(int(said_T[end - 1]) if take else -1 for end, take in zip(end_B, turn.take_B, strict=True))
        return Proposal(turn, said_B)

    def commit(self, proposal: Proposal, now: float) -> list[Answer]:
        """now: when its bytes were there. -> the answers that are complete"""
        (admitted, take_B, self.waiting), said_B = proposal
        advanced = [each.advanced(take, said, now) for each, take, said in zip(admitted, take_B, said_B, strict=True)]
        self.running = tuple(each for each in advanced if len(each.answer) < each.request.new_tokens)
        return [
            Answer(request=each.request, text=each.answer, first=now if each.first is None else each.first, last=now)
            for each in advanced
            if len(each.answer) == each.request.new_tokens
        ]

    def release(self) -> tuple[Request, ...]:
        """Everything unanswered, the oldest first, to be submitted again here or elsewhere; this engine is idle."""
        requests = (*(each.request for each in self.running), *self.waiting)
        self.running, self.waiting = (), ()
        return requests


def reading_of(turn: Turn) -> Reading:
    parts = [np.zeros((3, 0), dtype=np.int64)]
    for each, take in zip(turn.running, turn.take_B, strict=True):
        text = np.frombuffer(each.text[each.done : each.done + take], dtype=np.uint8)
        parts.append(
            np.stack([text, np.full(take, each.slot), np.arange(each.done, each.done + take)]).astype(np.int64)
        )
    return Reading(*np.concatenate(parts, axis=1))


def require_room(request: Request, places: int) -> None:
    """places: of a sequence in the cache. The last byte of an answer is never read."""
    if (need := len(request.prompt) + request.new_tokens - 1) > places:
        raise ValueError(
            f"request {request.id} needs {need} places; the model has {places}: shorten the prompt of "
            f"{len(request.prompt)} bytes or ask for fewer than {request.new_tokens}"
        )


def share_of(requests: Iterable[Request], peers: Peers) -> list[Request]:
    """Dealt like cards. -> those of this rank"""
    return [request for request in requests if request.id % peers.size == peers.rank]
