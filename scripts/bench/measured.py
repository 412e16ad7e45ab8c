"""Measured: one named workload, timed, as the suite's JSON keeps it and its table shows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from scripts.bench.table import Samples, against, band, median_ratio

T = TypeVar("T")
CLEAN, FEWEST = 0.05, 3
FORWARD, BACKWARD = "forward", "forward + backward"
KINDS = (FORWARD, BACKWARD)
HEADS = (
    *("workload", "what", "clock", "allocator", "ours, ms", "× floor", "best peer", "vs best peer", "noise", "rounds"),
    *("every peer", "remark"),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """seconds: by candidate and round, of "ours", "again" (ours once more), "floor" where there is one, and the peers.
    A peer that is too slow has one run. foreign: the share of the CPUs that other programs took in each round.
    absent: why a peer is not among them. refused: why nothing can be claimed of it."""

    workload: str
    what: str
    clock: str
    seconds: dict[str, list[float]]
    foreign: list[float]
    absent: dict[str, str] = field(default_factory=dict)
    remark: str = ""
    refused: str = ""

    @classmethod
    def of(cls, samples: Samples, **more: str | dict[str, str]) -> Measured:
        return cls(seconds=samples.seconds, foreign=samples.foreign, **more)  # type: ignore[arg-type]

    def row(self, allocator: str) -> list[object]:
        """Ratios are of the same round, their medians shown; a wall time counts in the rounds that were clean."""
        seconds, reason = self._counted(), self._reason()
        head: list[object] = [self.workload, self.what, self.clock, allocator]
        if reason:
            return [*head, *["-"] * 5, len(self.foreign), "-", "; ".join(filter(None, (reason, self.remark)))]
        ours, noise = seconds["ours"], band(seconds["again"], seconds["ours"])
        gains = {name: _ratio(taken, ours) for name, taken in seconds.items() if name not in ("ours", "again", "floor")}
        best = min(gains, key=gains.__getitem__, default=None)
        every = ", ".join(f"{name} {against(gain, noise)}" for name, gain in gains.items())
        return [
            *head,
            f"{statistics.median(ours) * 1e3:.4g}",
            f"{_ratio(ours, seconds['floor']):.2f}" if "floor" in seconds else "-",
            best or "-",
            against(gains[best], noise) if best else "-",
            f"{noise:.3f}",
            len(ours),
            every or "-",
            "; ".join(filter(None, (self.remark, "too few rounds for a claim" if len(ours) < FEWEST else ""))),
        ]

    def _counted(self) -> dict[str, list[float]]:
        if self.clock != "wall":
            return self.seconds
        return {
            name: [one for one, share in zip(taken, self.foreign) if not share > CLEAN] if len(taken) > 1 else taken
            for name, taken in self.seconds.items()
        }

    def _reason(self) -> str:
        clean = sum(not share > CLEAN for share in self.foreign)
        if self.refused or self.clock != "wall" or clean >= FEWEST:
            return self.refused
        return f"refused: {clean} of {len(self.foreign)} rounds clean, a wall time needs {FEWEST}"


def shared(seconds: float, weight: Mapping[T, float]) -> Iterator[tuple[T, float]]:
    """Each with its share of the seconds that are left when its turn comes, by weight."""
    end, left = time.monotonic() + seconds, dict(weight)
    for one in weight:
        yield one, (end - time.monotonic()) * left[one] / sum(left.values())
        del left[one]


def _ratio(taken: Sequence[float], base: Sequence[float]) -> float:
    if len(taken) == len(base):
        return median_ratio(taken, base)
    return statistics.median(taken) / statistics.median(base)
