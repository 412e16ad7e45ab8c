"""Certificates: what no placement can beat, in closed form, so that anyone can check it without a solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from placement.arrays import FloatArray
from placement.copies import cheapest_counts, require_room, thinning_C
from placement.topology import Topology

CLOSED_FORM = "closed form"
# Sums of floating-point loads in different orders differ by less than this, relatively.
ROUNDING = 1e-9
# A solver proves optima to within its tolerances, about a millionth.
PROVED = 2e-6


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """No placement of this layer can have a peak/mean below bound; this one has (1 + gap) * bound.

    Copies of an expert share its load evenly. local and local_bound say the same of hops, where the trace knew them:
    the share of hops from this layer to the next that stay on a rank, and what no placement exceeds.
    method names the arguments that the bounds rest on: "closed form" is recomputed by `verify`, a solver's is not.
    """

    bound: float
    gap: float
    method: str
    local: float | None = None
    local_bound: float | None = None

    @property
    def peak_over_mean(self) -> float:
        return (1.0 + self.gap) * self.bound

    @property
    def status(self) -> str:
        """Optimal is said only of a value that meets its bound, whatever a solver calls it."""
        return "optimal" if self.gap <= PROVED else f"feasible, gap {100 * self.gap:.3g} %"

    def fields(self) -> dict[str, float | str]:
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        numbers = {name: float(fields[name]) for name in ("bound", "gap", "local", "local_bound") if name in fields}
        if not all(math.isfinite(number) for number in numbers.values()):
            raise ValueError(f"expected finite numbers; got {numbers}")
        return cls(method=str(fields["method"]), **{"bound": fields["bound"], "gap": fields["gap"], **numbers})


def peak_bound_L(load_LE: FloatArray, topology: Topology) -> FloatArray:
    """No placement of a layer has a peak/mean below this, where copies share their expert's load evenly.

    The largest of: the mean; the busiest copy under the best counts of copies; and, where there is a slot for each
    expert and no more, what full ranks must carry, and the pigeonholes force on the rank that holds the heaviest ones.
    """
    require_room(load_LE.shape[1], topology)
    mean_L = load_LE.sum(axis=1) / sum(topology.speed_R)
    best_C = thinning_C(topology)
    # Counts alone: that copies must also find distinct ranks with room can only make it worse.
    copies_LE = cheapest_counts(load_LE, min(topology.slots, load_LE.shape[1] * len(best_C)), best_C)
    thinnest_L = (load_LE * best_C[copies_LE - 1]).max(axis=1)
    bound_L = np.maximum(mean_L, thinnest_L)
    if topology.slots == load_LE.shape[1]:
        bound_L = np.maximum(bound_L, _pigeonhole_L(load_LE, topology))
    relative_L: FloatArray = bound_L / mean_L
    return relative_L


def _pigeonhole_L(load_LE: FloatArray, topology: Topology) -> FloatArray:
    """Every slot is taken by its own expert: a rank with the heaviest fills its other slots, at best with the lightest.

    Each rank is full, so each has at least as many of the lightest as it has slots. And among the (j R + 1) heaviest
    some rank has j + 1, so at least the lightest j + 1 of those, and its other slots.
    """
    rising_LE = np.sort(load_LE, axis=1)
    sum_LE = np.pad(np.cumsum(rising_LE, axis=1), ((0, 0), (1, 0)))
    experts = load_LE.shape[1]
    used = [(slots, speed) for slots, speed in zip(topology.slots_R, topology.speed_R, strict=True) if slots]
    bound_L: FloatArray = np.max([sum_LE[:, slots] / speed for slots, speed in used], axis=0)
    for together in range(1, min(slots for slots, _ in used) + 1):
        heaviest = (together - 1) * len(used) + 1
        first = experts - heaviest
        heavy_L = sum_LE[:, first + together] - sum_LE[:, first]
        time_LR = [(heavy_L + sum_LE[:, slots - together]) / speed for slots, speed in used]
        bound_L = np.maximum(bound_L, np.min(time_LR, axis=0))
    return bound_L
