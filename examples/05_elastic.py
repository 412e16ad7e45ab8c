"""Experts that move while a model trains: planned from their loads, moved between two steps, saved by expert.

torchrun --standalone --nproc-per-node 4 examples/05_elastic.py
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from moe import Elastic, MoE, MoEConfig, average_expert_grads, checkpoint, leave_experts_alone, plan_of, settle_prices
from moe.comm import Peers, gather_objects
from placement import ExpertShape, GemmCurve, Packed, Topology, advise

CONFIG = MoEConfig(dim=32, hidden=64, num_experts=16, top_k=2)
SHAPE = ExpertShape(dim=32, hidden=64, value_bytes=4)


def peak(layer: MoE) -> float:
    """Rows of the busiest rank over the mean of ranks, in the step just settled."""
    load_R = layer.placement.held_RE @ layer.router.closed["kept_E"].numpy()
    return float(load_R.max() / load_R.mean())


def main() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    peers = Peers.of(group)
    torch.manual_seed(0)
    model = MoE(CONFIG, group)
    outside = DistributedDataParallel(leave_experts_alone(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    elastic = Elastic(
        model,
        optimizer,
        Topology.even(ranks=peers.size, slots=4, ranks_per_node=peers.size),
        plan_every=10,
        window=2,
        planner=Packed(),
        # Time the matrices on your machine with `moe-place calibrate`: this curve is modelled.
        advise=partial(advise, curve=GemmCurve.modelled(SHAPE, flops=5e9), shape=SHAPE, steps=10_000),
        most_bytes=2 * 4 * 3 * 3 * 32 * 64,  # two experts with their moments: a short pause, several times
    )
    model.router.price_E[::4] -= 0.05  # four experts are cheap, and so hot; dealt like cards, all four are on one rank
    for step in range(40):
        generator = torch.Generator().manual_seed(100 * step + peers.rank)
        x = torch.randn(64, 32, generator=generator)
        F.mse_loss(outside(x), x).backward()  # type: ignore[no-untyped-call]
        average_expert_grads(model, group)
        optimizer.step()
        optimizer.zero_grad()
        settle_prices(model)
        busiest = peak(model)
        moved = elastic.step()
        if peers.rank == 0 and (moved is not None or step % 10 == 9):
            news = f"; {moved.moves} experts moved, {moved.left} to go" if moved else ""
            print(f"step {step:2}: busiest rank {busiest:.2f} of the mean{news}")
    with tempfile.TemporaryDirectory() as made_here:
        folder = Path(gather_objects(made_here, peers)[0]) / "step40"
        checkpoint.save(folder, model, optimizer)
        alone = MoE(CONFIG)  # all experts in one process: what 4 ranks saved, any number can load
        checkpoint.load(folder, alone, group=None)
        same = [torch.equal(alone.experts.up[e], s["up"]) for e, s in model.expert_state().items()]
        gather_objects(None, peers)  # the folder goes when all have read it
    if peers.rank == 0:
        counts = np.bincount(plan_of(model).placement_L[0].home_E)
        print(f"{elastic.pulse.reason}\nexperts by rank {counts.tolist()}; one process reads them all: {all(same)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
