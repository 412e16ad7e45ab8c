"""Assigners: (count_RE, Placement) -> Assignment. Every rank decides alike, so a decision must be a function of these
two alone: whole numbers, stable sorts, ties to the lowest index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from placement import Placement
from routing.assignment import Assignment


class Assigner(Protocol):
    def __call__(self, count_RE: NDArray[np.int64], placement: Placement) -> Assignment:
        """count_RE: rows that each rank routed to each expert."""


@dataclass(frozen=True, kw_only=True)
class AtHome:
    """Every row is computed at its expert's home: plain expert parallelism."""

    def __call__(self, count_RE: NDArray[np.int64], placement: Placement) -> Assignment:
        return at_home(count_RE, count_RE.sum(axis=0), placement)


def at_home(count_RE: NDArray[np.int64], load_E: NDArray[np.int64], placement: Placement) -> Assignment:
    if count_RE.shape != placement.held_RE.shape:
        raise ValueError(
            f"count_RE has shape {count_RE.shape}, but the placement has {placement.ranks} ranks and "
            f"{placement.num_experts} experts; count every rank's rows for every expert"
        )
    quota_RE = np.zeros_like(count_RE)
    quota_RE[placement.home_E, np.arange(placement.num_experts)] = load_E
    return Assignment(count_RE=count_RE, quota_RE=quota_RE)
