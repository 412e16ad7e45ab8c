"""Clock: times on a GPU by events, elsewhere by the wall, within a budget; a candidate that fails is a reason, not an
end."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Run = Callable[[], object]
SLOW = 5.0


@dataclass
class Clock:
    """budget: seconds for everything. skipped: what was left out for want of them."""

    device: torch.device
    budget: float
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.budget

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        """Is there time for what takes so many seconds? If not, it is said at the end that it was left out."""
        if self.left < seconds:
            self.skipped.append(what)
        return self.left >= seconds

    def once(self, run: Run) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def medians(self, candidates: Mapping[str, Run], rounds: int) -> dict[str, float | str]:
        """Median seconds of each candidate, in turn, round after round; or why it did not run.

        The first of them sets the pace: who takes SLOW times as long is not run again. The warm-up is not counted.
        """
        found: dict[str, float | str] = {}
        for name, run in candidates.items():
            try:
                self.once(run)
                found[name] = self.once(run)
            except (RuntimeError, ValueError, ImportError, AttributeError, TypeError) as error:
                found[name] = reason(error)
                self.tidy()
        pace = next((taken for taken in found.values() if isinstance(taken, float)), 0.0)
        quick: dict[str, list[float]] = {
            name: [] for name, taken in found.items() if isinstance(taken, float) and taken <= SLOW * max(pace, 1e-4)
        }
        for _ in range(rounds):
            if self.left < 0:
                break
            for name, seconds in quick.items():
                seconds.append(self.once(candidates[name]))
        return found | {name: statistics.median(seconds) for name, seconds in quick.items() if seconds}

    def peak(self, run: Run) -> float:
        """Bytes at the most, beyond those there were before. nan where nobody counts them."""
        if self.device.type != "cuda":
            run()
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    def syncs(self, run: Run) -> float:
        """How often the host waits for the device in one run, by torch's own debug mode. nan without a GPU."""
        run()
        if self.device.type != "cuda":
            return float("nan")
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return float(sum("synchroniz" in str(warning.message) for warning in caught))

    def tidy(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100]
