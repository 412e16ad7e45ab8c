"""Schedules: how many experts a token takes, by step and layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """k(step, layer), constant in stages: lower layers may start denser and all of them end sparse.

        Sparsify(stages=((0, (8, 8, 4, 2)), (90_000, 1)))

    From step 0 the layers take 8, 8, 4 and 2 experts, from step 90,000 all take one. A step is an optimiser step, told
    by `settle_prices`; every balancer derives its targets anew from the k in force.
    """

    stages: tuple[tuple[int, int | tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0:
            raise ValueError(f"the first stage starts at step 0; got stages from steps {starts}")
        if any(after <= before for before, after in pairwise(starts)):
            raise ValueError(f"each stage starts after the one before it; got stages from steps {starts}")
        lengths = {len(k) for _, k in self.stages if not isinstance(k, int)}
        if len(lengths) > 1:
            raise ValueError(f"every stage lists k for the same layers; got lists of {sorted(lengths)} layers")
        if any(k < 1 for _, ks in self.stages for k in ([ks] if isinstance(ks, int) else ks)):
            raise ValueError(f"every k is at least 1; got {self.stages}")

    def __call__(self, step: int, layer: int) -> int:
        k = next(k for start, k in reversed(self.stages) if start <= step)
        return k if isinstance(k, int) else k[layer]

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """The k of each stage in turn."""
        for start, ks in self.stages:
            if not isinstance(ks, int) and not 0 <= layer < len(ks):
                raise ValueError(f"the stage from step {start} lists k for {len(ks)} layers; there is none for {layer}")
        return tuple(self(start, layer) for start, _ in self.stages)
