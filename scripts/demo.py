"""The main job in small: one expert-parallel layer on several processes, its experts unevenly loaded.

    torchrun --standalone --nproc-per-node 4 scripts/demo.py

Shows the rows that each rank computes when experts stay at home and when they visit the least loaded ranks, and checks
outputs and every gradient against a literal loop on one process. Everything it prints is measured in this run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe import MoE, MoEConfig, reference
from moe.comm import Peers, gather_objects
from routing import Assigner, AtHome, LeastLoaded

CONFIG = MoEConfig(dim=64, hidden=128, num_experts=16, top_k=2)
ASSIGNERS: dict[str, Assigner] = {"at home": AtHome(), "least-loaded": LeastLoaded(headroom=1.05)}


class Outcome(NamedTuple):
    """What one rank computed, and what the plan was."""

    y: Tensor
    grads: dict[str, Tensor]
    load_R: list[int]
    loans: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=384, help="tokens of each rank")
    parser.add_argument(
        "--skew", type=float, default=0.3, help="how much all tokens are alike; 0: hardly any hot expert"
    )
    parser.add_argument("--picture", type=Path, default=Path("out/demo.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    peers = Peers.of(dist.group.WORLD)
    x_RTD = skewed_tokens(peers.size, arguments.tokens, arguments.skew)
    outcomes = {
        name: gather_objects(run(assigner, x_RTD[peers.rank], peers), peers) for name, assigner in ASSIGNERS.items()
    }
    error = 0.0
    if peers.rank == 0:
        error = report(outcomes, x_RTD, arguments.picture)
    dist.destroy_process_group()
    sys.exit(not error <= 1e-10)


def skewed_tokens(ranks: int, num_tokens: int, skew: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pull_D = torch.randn(CONFIG.dim, generator=generator, dtype=torch.float64)
    return torch.randn(ranks, num_tokens, CONFIG.dim, generator=generator, dtype=torch.float64) + skew * pull_D


def build(assigner: Assigner, peers: Peers) -> MoE:
    torch.manual_seed(0)
    return MoE(replace(CONFIG, assigner=assigner), peers.group, dtype=torch.float64)


def run(assigner: Assigner, x_TD: Tensor, peers: Peers) -> Outcome:
    layer, plans = build(assigner, peers), []
    layer.observe(lambda choice, assignment: plans.append(assignment))
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD)
    y_TD.square().sum().backward()
    grads = {"input": x_TD.grad, "router": layer.router.weight.grad}
    for name, weight in layer.experts.named_parameters():
        grads |= {f"{expert} {name}": weight.grad[slot] for slot, expert in enumerate(layer.experts.expert_ids)}  # type: ignore[index]
    known = {name: grad for name, grad in grads.items() if grad is not None}
    return Outcome(y_TD.detach(), known, plans[0].load_R.tolist(), len(plans[0].loans(layer.placement)))


def report(outcomes: dict[str, list[Outcome]], x_RTD: Tensor, picture: Path) -> float:
    """Print the table, check against one process, draw the picture. -> the largest error"""
    ranks, num_tokens = x_RTD.shape[:2]
    print(
        f"\n{ranks} processes on CPU (gloo), {CONFIG.num_experts} experts, top-{CONFIG.top_k}, {num_tokens} tokens a "
        f"rank, skewed; rows computed by each rank:\n"
    )
    print(f"{'':14}" + "".join(f"{f'rank {rank}':>8}" for rank in range(ranks)) + f"{'peak/mean':>11}{'loans':>7}")
    for name, (first, *_) in outcomes.items():
        load_R = np.array(first.load_R)
        print(
            f"{name:14}"
            + "".join(f"{load:8}" for load in first.load_R)
            + f"{load_R.max() / load_R.mean():11.2f}{first.loans:7}"
        )
    error = largest_error(outcomes, x_RTD)
    verdict = "equal" if error <= 1e-10 else "DO NOT EQUAL"
    print(f"\noutputs and all gradients {verdict} the single-process reference: max error {error:.1e} (float64)")
    draw({name: some[0].load_R for name, some in outcomes.items()}, picture)
    print(f"picture: {picture}\n")
    return error


def largest_error(outcomes: dict[str, list[Outcome]], x_RTD: Tensor) -> float:
    """Relative to the largest value of each quantity, where that exceeds 1."""
    whole = build(AtHome(), Peers.of(None))
    x_TD = x_RTD.flatten(0, 1).requires_grad_()
    weights = dict(whole.experts.named_parameters())
    state = {e: {name: weight[e] for name, weight in weights.items()} for e in whole.experts.expert_ids}
    y_TD = reference(x_TD, whole.router(x_TD), state, CONFIG.activation)
    y_TD.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x_TD.grad is not None
    want = {f"{e} {name}": weight.grad[e] for name, weight in weights.items() for e in state}  # type: ignore[index]
    errors = []
    for some in outcomes.values():
        router = torch.stack([outcome.grads["router"] for outcome in some]).sum(dim=0)
        pairs = [(router, whole.router.weight.grad)]
        pairs.append((torch.cat([outcome.y for outcome in some]), y_TD.detach()))
        pairs.append((torch.cat([outcome.grads["input"] for outcome in some]), x_TD.grad))
        pairs += [(grad, want[name]) for outcome in some for name, grad in outcome.grads.items() if name in want]
        errors += [
            ((got - true).abs().max() / true.abs().max().clamp(min=1)).item() for got, true in pairs if true is not None
        ]
    return float(np.max(errors))  # which, unlike max, does not pass over a NaN


def draw(loads: dict[str, list[int]], picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(loads), sharey=True, figsize=(8, 3.2), layout="constrained")
    for axis, colour, (name, load_R) in zip(axes, ("#c8553d", "#2a7f8e"), loads.items()):
        mean = float(np.mean(load_R))
        axis.bar([f"rank {rank}" for rank in range(len(load_R))], load_R, color=colour)
        axis.axhline(mean, color="black", linewidth=1, linestyle="--")
        axis.set_title(f"{name}: peak/mean {max(load_R) / mean:.2f}", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rows computed (measured)")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
