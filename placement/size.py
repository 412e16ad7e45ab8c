"""Sizing: what the busiest rank must hold and how long a step takes, for several world sizes and slot counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.greedy import Packed
from placement.metrics import peak_over_mean_L
from placement.simulate import ExpertShape, GemmCurve, simulate
from placement.topology import Topology
from placement.trace import LoadTrace


@dataclass(frozen=True, kw_only=True)
class Size:
    """expert_bytes: all layers, on the rank that holds most. peak_over_mean: of the worst layer. seconds: mean step."""

    ranks: int
    slots: int
    expert_bytes: int
    peak_over_mean: float
    seconds: float


def size(
    trace: LoadTrace,
    machine: Topology,
    ranks: Sequence[int],
    spare: Sequence[int],
    *,
    curve: GemmCurve,
    shape: ExpertShape,
) -> tuple[Size, ...]:
    """Packed plans for each number of ranks and of spare slots (slots beyond one an expert, of all ranks together).

    machine gives the links and the ranks per node; its own slots, speeds and memory are not used.
    """
    found = []
    for count in ranks:
        for extra in spare:
            if extra < 0 or count < 1:
                raise ValueError(f"ranks must be at least 1 and spare slots at least 0; got {count} and {extra}")
            dealt = Topology.fitting(
                num_experts=trace.num_experts, ranks=count, ranks_per_node=machine.ranks_per_node, spare=extra
            )
            topology = replace(dealt, within_node=machine.within_node, across_nodes=machine.across_nodes)
            plan = Packed()(trace, topology)
            held = max(int((placement.expert_RS >= 0).sum(axis=1).max()) for placement in plan.placement_L)
            found.append(
                Size(
                    ranks=count,
                    slots=topology.slots,
                    expert_bytes=held * shape.expert_bytes * trace.layers,
                    peak_over_mean=float(peak_over_mean_L(plan, trace.load_LE, topology).max()),
                    seconds=float(simulate(plan, trace, topology, curve, shape).step_W.mean()),
                )
            )
    return tuple(found)
