"""A small model, trained by a DeepSpeed engine on many ranks and by hand on one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from moe import MoE, MoEConfig, clip_grad_norm, settle_prices
from placement import Placement
from routing import LeastLoaded, LossFree, Sigmoid

EXPERTS, DIM, TOKENS, MICRO, STEPS = 8, 8, 12, 2, 3
CONFIG = MoEConfig(
    dim=DIM, hidden=16, num_experts=EXPERTS, top_k=2, score=Sigmoid(), balancer=LossFree(step=1e-2), bias=True,
    shared_hidden=8, assigner=LeastLoaded(headroom=1.2),
)  # fmt: skip


class Net(nn.Module):
    def __init__(self, group: Any = None, placement: Placement | None = None, config: MoEConfig = CONFIG) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(DIM, DIM)
        self.expertly_named = MoE(config, group, placement)
        self.last = nn.Linear(DIM, DIM)
        self.recompute = self.autocast = False
        self.loans: list[int] = []
        self.expertly_named.observe(lambda _, a: self.loans.append(len(a.loans(self.expertly_named.placement))))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.mse_loss(self.run(x).float(), target.float())

    def run(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        y = checkpoint(self.expertly_named, h, use_reentrant=False) if self.recompute else self.expertly_named(h)
        return self.last(y)  # type: ignore[no-any-return]


class Trained(NamedTuple):
    """norms: before clipping, by step. shared: weights of all ranks. experts: this rank's. loans: by micro-batch."""

    norms: list[float]
    shared: dict[str, Tensor]
    experts: dict[int, dict[str, Tensor]]
    price_E: Tensor
    loans: list[int]


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def adam(parameters: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(TOKENS, DIM, generator=generator) + 0.5, torch.randn(TOKENS, DIM, generator=generator)


def import_deepspeed() -> Any:
    """In a rank, which may have met the others without torchrun."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ.update({"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})  # not used: the ranks have met already
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    return deepspeed


def settings(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": TOKENS,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **more,
    }


def engine_of(
    config: dict[str, Any],
    ep_size: int,
    make: Callable[[Any], Optimizer] | None = adam,
    *,
    in_order: bool = False,
    model: nn.Module | None = None,
) -> Any:
    import_deepspeed()
    from moe.integrations.deepspeed import expert_group, initialize

    group = expert_group(ep_size)
    if model is None:
        model = Net(group, Placement(expert_RS=np.arange(EXPERTS).reshape(ep_size, -1)) if in_order else None)
    optimizer = None if make is None else make(model.parameters())
    return initialize(model=model, optimizer=optimizer, config=config)[0]


def steps(engine: Any, numbers: Iterable[int] = range(STEPS), scale: float = 1.0) -> list[float]:
    """Optimiser steps on this rank's batches. -> their norms"""
    norms = []
    dtype = next(engine.module.parameters()).dtype
    for number in numbers:
        for micro in range(MICRO):
            x, target = batch(dist.get_rank(), MICRO * number + micro)
            engine.backward(scale * engine(x.to(dtype), target.to(dtype)))
            engine.step()
        norms.append(float(norm) if (norm := engine.get_global_grad_norm()) is not None else math.nan)
    return norms


def state_of(net: Net, norms: list[float]) -> Trained:
    layer = net.expertly_named
    return Trained(
        norms=norms,
        shared={
            name: weight.detach().clone()
            for name, weight in net.named_parameters()
            if not name.startswith("expertly_named.experts.")
        },
        experts={e: {name: w.clone() for name, w in state.items()} for e, state in layer.expert_state().items()},
        price_E=layer.router.price_E.clone(),
        loans=net.loans,
    )


def whole(ranks: int, make: Callable[[Any], Optimizer], max_norm: float = 0.1) -> Trained:
    """The same by hand, all ranks' batches in this process."""
    net = Net(config=CONFIG)
    optimizer, norms = make(net.parameters()), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO):
            for rank in range(ranks):
                (net(*batch(rank, MICRO * step + micro)) / (ranks * MICRO)).backward()
        norms.append(clip_grad_norm(net, max_norm).item())
        optimizer.step()
        settle_prices(net, None)
    assert min(norms) > max_norm
    return state_of(net, norms)


def error(got: Trained, want: Trained) -> float:
    """The largest difference of any weight."""
    return max(part.abs().max().item() for part in _differences(got, want))


def distance(got: Trained, want: Trained) -> float:
    """Of all weights together."""
    return math.sqrt(sum(part.square().sum().item() for part in _differences(got, want)))


def _differences(got: Trained, want: Trained) -> list[Tensor]:
    pairs = [(got.shared[name], want.shared[name]) for name in want.shared]
    pairs += [(w, want.experts[e][name]) for e, state in got.experts.items() for name, w in state.items()]
    return [mine.float() - theirs.float() for mine, theirs in pairs]
