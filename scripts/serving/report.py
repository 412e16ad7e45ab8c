"""What a run of requests came to: latencies as percentiles, tokens by time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.serving.engine import Answer

PERCENTILES = (50, 90, 99)


def line_of(answer: Answer, rank: int) -> dict[str, Any]:
    """What is written of a request, as JSON. Bytes are latin-1, a character each."""
    return {
        "id": answer.request.id,
        "rank": rank,
        "topic": answer.request.topic,
        "arrival": answer.request.arrival,
        "prompt": answer.request.prompt.decode("latin-1"),
        "answer": answer.text.decode("latin-1"),
        "first": answer.first,
        "last": answer.last,
        "time_to_first_token": answer.wait,
        "time_per_token": answer.pace,
    }


def summary(lines: Sequence[dict[str, Any]], *, expected: int, steps: int, seconds: float) -> dict[str, Any]:
    """Raises if a request was lost or answered twice: that is a bug, and no number after it means anything."""
    if sorted(line["id"] for line in lines) != list(range(expected)):
        counts = np.bincount([line["id"] for line in lines], minlength=expected)
        raise RuntimeError(
            f"{expected} requests came; lost: {np.flatnonzero(counts == 0).tolist()}, answered more than once: "
            f"{np.flatnonzero(counts > 1).tolist()}"
        )
    tokens = sum(len(line["answer"]) for line in lines)
    measured = {
        "requests": expected,
        "tokens": tokens,
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    return measured | {
        name: {f"p{p}": float(np.percentile([line[name] for line in lines] or [0.0], p)) for p in PERCENTILES}
        for name in ("time_to_first_token", "time_per_token")
    }
