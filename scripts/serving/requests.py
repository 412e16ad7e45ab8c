"""Requests: who asks for what, and when. An open loop: they come whether or not the earlier ones are answered.

A stream is a value, the same on every rank and in every run of one seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Continue the prompt by so many bytes. arrival: in the unit of the clock, seconds or steps."""

    id: int
    arrival: float
    prompt: bytes
    new_tokens: int
    topic: str = ""

    def __post_init__(self) -> None:
        if not self.prompt or self.new_tokens < 1:
            raise ValueError(
                f"request {self.id} has a prompt of {len(self.prompt)} bytes and asks for {self.new_tokens}; both must "
                f"be at least 1"
            )


class Arrivals(Protocol):
    def __call__(self, count: int, random: np.random.Generator) -> FloatArray:
        """-> arrival_N, ascending"""


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """rate: requests in a unit of the clock, each independent of the others."""

    rate: float

    def __post_init__(self) -> None:
        _require_positive(rate=self.rate)

    def __call__(self, count: int, random: np.random.Generator) -> FloatArray:
        return random.exponential(1 / self.rate, count).cumsum()


@dataclass(frozen=True, kw_only=True)
class Bursty:
    """The same rate in the long run, but requests come many at once: `burst` on average, in geometric numbers."""

    rate: float
    burst: float = 8.0

    def __post_init__(self) -> None:
        _require_positive(rate=self.rate)
        if not self.burst >= 1:
            raise ValueError(f"a burst has at least 1 request on average; got {self.burst}")

    def __call__(self, count: int, random: np.random.Generator) -> FloatArray:
        size_B = random.geometric(1 / self.burst, count)  # more bursts than are needed
        start_B = random.exponential(self.burst / self.rate, count).cumsum()
        return np.repeat(start_B, size_B)[:count]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Topics take turns at being hot, `period` requests each: a share `hot` is of the hot topic, the others of any."""

    period: int = 50
    hot: float = 0.8

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 <= self.hot <= 1:
            raise ValueError(f"period must be at least 1 and hot within 0..1; got {self.period} and {self.hot}")

    def __call__(self, number: int, topics: int, random: np.random.Generator) -> int:
        """-> the topic of a request"""
        any_topic, is_hot = int(random.integers(topics)), random.random() < self.hot
        return number // self.period % topics if is_hot else any_topic


def stream(
    texts: Mapping[str, Tensor],
    count: int,
    arrivals: Arrivals,
    drift: Drift = Drift(),
    *,
    prompt: tuple[int, int] = (8, 48),
    new_tokens: tuple[int, int] = (8, 32),
    seed: int = 0,
) -> tuple[Request, ...]:
    """texts: bytes to take prompts from, by topic. prompt, new_tokens: fewest and most bytes."""
    random = np.random.default_rng(seed)
    requests = []
    for number, arrival in enumerate(arrivals(count, random)):
        topic = list(texts)[drift(number, len(texts), random)]
        length, more = (int(random.integers(*span, endpoint=True)) for span in (prompt, new_tokens))
        start = int(random.integers(len(texts[topic]) - length))
        requests.append(
            Request(
                id=number,
                arrival=float(arrival),
                prompt=bytes(texts[topic][start : start + length].tolist()),
                new_tokens=more,
                topic=topic,
            )
        )
    return tuple(requests)


def _require_positive(*, rate: float) -> None:
    if not rate > 0:
        raise ValueError(f"rate={rate}; give how many requests come in a unit of the clock, above 0")
