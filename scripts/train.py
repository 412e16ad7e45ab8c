"""Train a small MoE language model on the sources of Python's standard library.

    torchrun --standalone --nproc-per-node 2 -m scripts.train --balance bip --steps 1000 -o out/bip

Experts are spread over all ranks, everything else is data-parallel. Writes to the folder: log.jsonl, a line every few
steps; one checkpoint for each rank, from which the same command goes on; at the end result.json, and the model by
expert, for scripts.generate on any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe import (
    EVERYONE,
    Meters,
    MoE,
    MoEConfig,
    average_expert_grads,
    charge,
    checkpoint,
    clip_grad_norm,
    leave_experts_alone,
    settle_prices,
)
from moe.comm import Group, Peers, gather_objects, sum_over, world_group
from routing import (
    Bip,
    GlobalLoss,
    JsonLines,
    LeastLoaded,
    LossFree,
    Quantile,
    SwitchLoss,
    Unpriced,
    Weigh,
)
from scripts.model import Bytes, Shape
from scripts.text import batch_of, split_by_file

MODEL, SHAPE = "model", "shape.pt"  # in the folder of a run that is done: moe.checkpoint's folder, and a Shape

BALANCE: dict[str, dict[str, Any]] = {
    "none": {},
    "switch": {"losses": (SwitchLoss(coefficient=1e-2),)},
    "global": {"losses": (GlobalLoss(coefficient=1e-2),)},
    "loss-free": {"balancer": LossFree(step=1e-3)},
    "bip": {"balancer": Bip(rounds=4)},
    "quantile": {"balancer": Quantile(rounds=1)},
    "quantile-next": {"balancer": Quantile(rounds=0)},
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and for how long. sequences: of a step, over all ranks and micro-batches."""

    shape: Shape
    steps: int
    sequences: int = 16
    micro_batches: int = 1
    seed: int = 0
    rate: float = 3e-3
    warm_up: int = 50


class Trainer:
    """A model, its optimiser and how far they are."""

    def __init__(self, run: Run, group: Group) -> None:
        peers = Peers.of(group)
        if run.sequences % (peers.size * run.micro_batches):
            raise ValueError(
                f"{run.sequences} sequences a step do not divide over {peers.size} ranks x {run.micro_batches} turns"
            )
        torch.manual_seed(run.seed)
        self.run, self.group, self.peers = run, group, peers
        self.model = Bytes(run.shape, group)
        self.outside: nn.Module = DistributedDataParallel(leave_experts_alone(self.model)) if group else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=run.rate, betas=(0.9, 0.95))
        self.step, self.seconds = 0, 0.0
        self.first: list[float] = []
        self.meters = Meters(self.model)

    def learn(self, text: Tensor) -> Tensor:
        """One step. -> the loss over all ranks, balancing losses left out"""
        start = time.perf_counter()
        run = self.run
        for settings in self.optimizer.param_groups:
            settings["lr"] = run.rate * min((self.step + 1) / run.warm_up, _cosine(self.step / run.steps))
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + self.step)  # the same batch on any ranks
        byte_BT, next_BT = batch_of(text, run.sequences, run.shape.length, generator)
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for micro in range(run.micro_batches):
            own = slice(self.peers.rank + micro * self.peers.size, None, self.peers.size * run.micro_batches)
            with self.unsynchronised(micro < run.micro_batches - 1):
                loss = F.cross_entropy(self.outside(byte_BT[own]).flatten(0, 1), next_BT[own].flatten())
                torch.autograd.backward(charge(self.model, loss) / run.micro_batches)
            total += loss.detach() / (run.micro_batches * self.peers.size)
        average_expert_grads(self.model, self.group)
        clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        settle_prices(self.model)
        self.meters.read(self.step)
        self.step += 1
        self.seconds += time.perf_counter() - start
        sum_over([total], self.peers)
        return total

    def unsynchronised(self, wanted: bool) -> AbstractContextManager[None]:
        """DDP reduces gradients after the last micro-batch alone."""
        if wanted and isinstance(self.outside, DistributedDataParallel):
            return self.outside.no_sync()
        return nullcontext()

    @torch.no_grad()
    def perplexity(self, text: Tensor, batches: int = 32) -> float:
        """Of held-out text, a byte. The same text whenever it is asked."""
        self.model.eval()
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros(())
        for _ in range(batches):
            byte_BT, next_BT = batch_of(text, 16, self.run.shape.length, generator)
            total += F.cross_entropy(self.model(byte_BT).flatten(0, 1), next_BT.flatten())
        self.model.train()
        return math.exp(total.item() / batches)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        state = {
            "run": self.run, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "tally": self.meters.tally, "first": self.first,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)
        if state["run"] != self.run:
            raise ValueError(f"{path} is of another run: {state['run']}; this is {self.run}; give another folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.first = state["step"], state["seconds"], state["first"]
        self.meters.tally = state["tally"]


def train(trainer: Trainer, folder: Path, *, save_every: int = 200, log_every: int = 10) -> dict[str, Any]:
    """To the end, from the folder's checkpoint if it has one. -> what came out, also in result.json"""
    peers = trainer.peers
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"rank{peers.rank}of{peers.size}.pt"
    if others := sorted(path.name for path in folder.glob("rank*of*.pt") if f"of{peers.size}." not in path.name):
        raise ValueError(
            f"{folder} has checkpoints of another number of ranks, {others}; this run has {peers.size}: start as many "
            f"ranks, or use another folder"
        )
    if own.exists():
        trainer.load(own)
    learnt, unseen = split_by_file()
    log = JsonLines(folder / "log.jsonl")
    shown = Progress(disable=peers.rank != 0 or not sys.stderr.isatty())
    with shown:
        bar = shown.add_task("training", total=trainer.run.steps, completed=trainer.step)
        while trainer.step < trainer.run.steps:
            loss = trainer.learn(learnt)
            step = trainer.step
            if step <= 10 or step % log_every == 0 or step == trainer.run.steps:
                vio = _step_vio(trainer.model)
                if step <= 10:
                    trainer.first.append(vio)
                if peers.rank == 0:
                    log(step, {"run": {"loss": loss.item(), "max_vio": vio, "seconds": trainer.seconds}})
            if step % save_every == 0 or step == trainer.run.steps:
                trainer.save(own)
            shown.update(bar, completed=step, description=f"loss {loss.item():.3f}" if step % 10 == 0 else None)
    if not gather_objects((folder / MODEL).exists(), peers)[0]:
        if peers.rank == 0:
            torch.save(trainer.run.shape, folder / SHAPE)
        checkpoint.save(folder / MODEL, trainer.model, group=trainer.group)
    result = _result(trainer, unseen)
    if peers.rank == 0:
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


def _result(trainer: Trainer, unseen: Tensor) -> dict[str, Any]:
    """The perplexity as the model was trained, and as it generates: from standing prices, which no later byte moves."""
    result: dict[str, Any] = {"perplexity": trainer.perplexity(unseen)}
    routers = [module.router for module in trainer.model.modules() if isinstance(module, MoE)]
    balancers = [router.balancer for router in routers]
    for router in routers:
        router.balancer = Unpriced()
    result["perplexity_standing"] = trainer.perplexity(unseen)
    for router, balancer in zip(routers, balancers):
        router.balancer = balancer
    tally = trainer.meters.tally
    return result | {
        "avg_max_vio": tally.avg.item(),
        "sup_max_vio": tally.sup.item(),
        "global_max_vio": tally.global_L.mean().item(),
        "first_max_vio": sum(trainer.first) / len(trainer.first),
        "seconds_per_step": trainer.seconds / trainer.step,
        "steps": trainer.step,
        "ranks": trainer.peers.size,
    }


def _step_vio(model: nn.Module) -> float:
    """MaxVio of the step just settled, the mean over layers."""
    loads = [module.router.closed["load_E"] for module in model.modules() if isinstance(module, MoE)]
    load_LE = torch.stack(loads)
    return float((load_LE.max(dim=1).values / load_LE.mean(dim=1) - 1).mean())


def _cosine(done: float) -> float:
    """From 1 down to a tenth."""
    return 0.55 + 0.45 * math.cos(math.pi * done)


def small(balance: str, *, experts: int, top_k: int) -> Shape:
    """The models of the comparison."""
    config = MoEConfig(dim=64, hidden=64, num_experts=experts, top_k=top_k, weigh=Weigh(normalize=True))
    return Shape(moe=replace(config, **BALANCE[balance]), layers=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--balance", choices=BALANCE, default="loss-free")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=16, help="of a step, over all ranks")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step, on each rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reroute", action="store_true", help="least-loaded rerouting between ranks")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    shape = small(arguments.balance, experts=arguments.experts, top_k=arguments.top_k)
    if arguments.reroute:
        shape = replace(shape, moe=replace(shape.moe, assigner=LeastLoaded()))
    run = Run(
        shape=shape,
        steps=arguments.steps,
        sequences=arguments.sequences,
        micro_batches=arguments.micro_batches,
        seed=arguments.seed,
    )
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" in os.environ:
        dist.init_process_group()
    try:
        result = train(Trainer(run, world_group()), arguments.output)
        if Peers.of(EVERYONE).rank == 0:
            print(json.dumps(result, indent=1))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
