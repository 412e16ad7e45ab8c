"""How long a step of a plan takes on a trace: a curve for the expert matrices, latency and bandwidth for the links.

A layer's time is that of its slowest rank's matrices plus twice (out and home) that of the rank that receives longest.
Tokens start out spread evenly over the ranks. Where the trace knows them, a token is sent once to a rank that holds
several of its experts, and once over the network to a node; where it does not, every row is sent on its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from placement.arrays import FloatArray
from placement.metrics import rank_load_WLR, token_rank
from placement.plan import Plan
from placement.topology import Topology
from placement.trace import LoadTrace


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """What an expert weighs and a row costs to send: `matrices` of dim x hidden, value_bytes each value."""

    dim: int
    hidden: int
    matrices: int = 3
    value_bytes: int = 2

    def __post_init__(self) -> None:
        if min(self.dim, self.hidden, self.matrices, self.value_bytes) < 1:
            raise ValueError(f"an expert's sizes must be at least 1; got {vars(self)}")

    @property
    def expert_bytes(self) -> int:
        return self.matrices * self.dim * self.hidden * self.value_bytes

    @property
    def row_bytes(self) -> int:
        return self.dim * self.value_bytes


@dataclass(frozen=True, kw_only=True)
class GemmCurve:
    """Seconds that a rank of speed 1 needs for so many rows of one layer. source: who measured it, or that nobody did.

    Between the rows given it is interpolated; beyond the last, extended at its last slope. dim, hidden: the expert it
    holds for; 0 where it is anyone's, as one made by hand may be.
    """

    rows: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str
    dim: int = 0
    hidden: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(float(value) for value in self.rows))
        object.__setattr__(self, "seconds", tuple(float(value) for value in self.seconds))
        rising = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if len(self.rows) < 2 or len(self.rows) != len(self.seconds) or not rising or self.rows[0] < 0:
            raise ValueError(f"a curve needs two ascending rows or more, a time each; got {self.rows}, {self.seconds}")
        if not all(0 <= value < math.inf for value in self.seconds):
            raise ValueError(f"a curve's seconds must be finite and >= 0; got {self.seconds}")

    @classmethod
    def modelled(cls, shape: ExpertShape, *, flops: float = 200e12, floor: float = 20e-6) -> Self:
        """Nobody measured this: a launch of `floor` seconds, then rows at a steady rate of `flops`."""
        cost = 2 * shape.matrices * shape.dim * shape.hidden / flops
        source = f"modelled: {floor:.3g} s + rows at {flops / 1e12:.4g} TFLOP/s"
        seconds = (floor, floor + 1e6 * cost)
        return cls(rows=(0, 1e6), seconds=seconds, source=source, dim=shape.dim, hidden=shape.hidden)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        sizes = {name: int(fields[name]) for name in ("dim", "hidden")}
        return cls(rows=tuple(fields["rows"]), seconds=tuple(fields["seconds"]), source=str(fields["source"]), **sizes)

    def require(self, shape: ExpertShape) -> None:
        """Refuse seconds that are of other matrices."""
        if (self.dim or shape.dim, self.hidden or shape.hidden) != (shape.dim, shape.hidden):
            raise ValueError(
                f"the curve is of experts of {self.dim} x {self.hidden}, not {shape.dim} x {shape.hidden}; calibrate "
                f"for this shape (--dim, --hidden)"
            )

    def __call__(self, rows: FloatArray) -> FloatArray:
        """0 for no rows."""
        row_N, second_N = np.array(self.rows), np.array(self.seconds)
        slope = max((second_N[-1] - second_N[-2]) / (row_N[-1] - row_N[-2]), 0.0)
        time = np.interp(rows, row_N, second_N) + slope * np.maximum(rows - row_N[-1], 0.0)
        return np.where(rows > 0, time, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """compute_WL, link_WL: seconds of each layer in each window. measured, modelled: what each part rests on."""

    compute_WL: FloatArray
    link_WL: FloatArray
    measured: tuple[str, ...]
    modelled: tuple[str, ...]

    @property
    def step_W(self) -> FloatArray:
        step_W: FloatArray = (self.compute_WL + self.link_WL).sum(axis=1)
        return step_W


def simulate(plan: Plan, trace: LoadTrace, topology: Topology, curve: GemmCurve, shape: ExpertShape) -> Simulation:
    curve.require(shape)
    load_WLR = rank_load_WLR(plan, trace.load_WLE)
    compute_WL = (curve(load_WLR) / np.array(topology.speed_R)).max(axis=2)
    if trace.expert_TLK is None:
        near_WLR, far_WLR = _every_row(load_WLR, topology)
    else:
        near_WLR, far_WLR = _once_each(plan, trace, topology)
    within, across = topology.within_node, topology.across_nodes
    byte = shape.row_bytes
    near = np.where(near_WLR > 0, within.latency + near_WLR * byte / within.bandwidth, 0.0)
    far = np.where(far_WLR > 0, across.latency + far_WLR * byte / across.bandwidth, 0.0)
    link_WL = 2 * (near + far).max(axis=2)
    links = f"links: {within.bandwidth / 1e9:.4g} GB/s within a node, {across.bandwidth / 1e9:.4g} GB/s across"
    parts = (f"matrices: {curve.source}", f"{links}; rows counted from the trace")
    guessed = curve.source.startswith("modelled")
    return Simulation(
        compute_WL=compute_WL,
        link_WL=link_WL,
        measured=() if guessed else parts[:1],
        modelled=parts if guessed else parts[1:],
    )


def _every_row(load_WLR: FloatArray, topology: Topology) -> tuple[FloatArray, FloatArray]:
    """Rows that each rank receives from its node and from other nodes, tokens spread evenly over the ranks."""
    node_R = np.array(topology.node_R)
    peers_R = np.bincount(node_R)[node_R]
    return load_WLR * (peers_R - 1) / topology.ranks, load_WLR * (topology.ranks - peers_R) / topology.ranks


def _once_each(plan: Plan, trace: LoadTrace, topology: Topology) -> tuple[FloatArray, FloatArray]:
    """The same with every token sent once to a rank; over the network once to a node, shared out over its ranks."""
    assert trace.expert_TLK is not None
    assert trace.window_T is not None
    node_R = np.array(topology.node_R)
    peers_R = np.bincount(node_R)[node_R]
    near = np.zeros((trace.windows, trace.layers, topology.ranks))
    far = np.zeros_like(near)
    in_node = np.eye(topology.nodes)[node_R]
    for layer, placement in enumerate(plan.placement_L):
        token_N, rank_N = token_rank(placement, trace.expert_TLK[:, layer])
        reached_TR = np.zeros((len(trace.expert_TLK), topology.ranks))
        reached_TR[token_N, rank_N] = 1.0
        node_TD = np.minimum(reached_TR @ in_node, 1.0)
        for window in range(trace.windows):
            here = trace.window_T == window
            to_rank, to_node = reached_TR[here].sum(axis=0), node_TD[here].sum(axis=0)
            near[window, layer] = to_rank * (peers_R - 1) / peers_R
            far[window, layer] = to_node[node_R] / peers_R * (topology.ranks - peers_R) / topology.ranks
    return near, far
