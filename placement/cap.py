"""Balance caps that cannot be kept, and those that were not: said, never passed over."""

from __future__ import annotations

import math

from placement.arrays import FloatArray, IntArray
from placement.bounds import PROVED, ROUNDING, peak_bound_L
from placement.robust import scenario_peaks
from placement.topology import Topology


def require_possible(load_LKE: FloatArray, topology: Topology, cap: float, layer_L: tuple[int, ...]) -> None:
    """Refuse a cap below the closed-form bound of some layer in some scenario."""
    for scenario in range(load_LKE.shape[1]):
        bound_L = peak_bound_L(load_LKE[:, scenario], topology)
        if (worst := float(bound_L.max())) > cap * (1 + ROUNDING):
            raise ValueError(
                f"no placement keeps a balance cap of {cap}: the bound of layer {layer_L[int(bound_L.argmax())]} is "
                f"{worst:.6g}; raise the cap, or add slots"
            )


def kept(expert_LRS: IntArray, load_LKE: FloatArray, topology: Topology, cap: float, layer_L: tuple[int, ...]) -> str:
    """What provenance says of a cap, to within a solver's tolerance."""
    if cap == math.inf:
        return "none"
    over_L = scenario_peaks(expert_LRS, load_LKE, topology).max(axis=1) > cap * (1 + PROVED)
    layers = [layer for layer, over in zip(layer_L, over_L.tolist(), strict=True) if over]
    return f"not kept in layers {', '.join(map(str, layers))}: none found" if layers else "kept"
