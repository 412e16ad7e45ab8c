"""Plan offline: record loads, plan for several tasks at once, prove it, and follow a drift with few moves.

    python examples/03_plan_offline.py

No GPU and no process group: planning is arithmetic on counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from placement import LoadTrace, Packed, Rebalance, Robust, RoundRobin, Topology, merge, verify
from placement.formats import write_plan
from placement.metrics import moves_L, peak_over_mean, rank_load_WLR

LAYERS, EXPERTS = 6, 64


def recorded(seed: int, task: str, batches: int = 8) -> LoadTrace:
    """What a recorder would hand over: rows sent to each expert, batch by batch. Each task likes its own experts."""
    random = np.random.default_rng(seed)
    taste_LE = random.lognormal(0.0, 0.8, (LAYERS, EXPERTS))
    rows_WLE = random.poisson(100 * taste_LE, (batches, LAYERS, EXPERTS)).astype(np.float64)
    return LoadTrace(load_WLE=rows_WLE, name_W=(task,) * batches)


def main() -> None:
    trace = merge([recorded(0, "code"), recorded(1, "law"), recorded(2, "chat")])
    fit, held = trace.split()  # every second batch judges
    topology = Topology.even(ranks=8, slots=9, ranks_per_node=4)  # 8 spare slots a layer

    print("peak/mean of a batch, held out")
    for planner in (RoundRobin(), Packed(), Robust()):
        plan = planner(fit, topology)
        peak_WL = peak_over_mean(rank_load_WLR(plan, held.load_WLE), topology.speed_R)
        print(f"  {type(planner).__name__:<11}{peak_WL.mean():.3f}")

    plan = Packed()(fit, topology)
    certificate = plan.certificate_L[0]
    print(f"layer 0: {certificate.peak_over_mean:.4f}, nothing is below {certificate.bound:.4f}: {certificate.status}")
    assert not [fault for verdict in verify(plan, fit) for fault in verdict.faults]

    drifted = LoadTrace(load_WLE=fit.load_WLE * np.random.default_rng(3).lognormal(0, 0.3, (1, LAYERS, EXPERTS)))
    print("after a drift")
    for budget in (0, 4, 16):
        followed = Rebalance(start=plan, most_moves=budget)(drifted, topology)
        peak = np.mean([certificate.peak_over_mean for certificate in followed.certificate_L])
        print(f"  at most {budget:>2} fetches a layer: {peak:.3f} ({moves_L(plan, followed).sum()} in all)")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts.yaml"
        write_plan(plan, path, "trtllm")
        print("for TensorRT-LLM:", path.read_text().splitlines()[0], "...")


if __name__ == "__main__":
    main()
