"""What the tests of prices share: a small priced model, its batches, and every balancer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe import MoE, MoEConfig, World
from routing import (
    Balancer,
    Bip,
    Cutoff,
    EdgeQuantile,
    LossFree,
    Quantile,
    Router,
    Sinkhorn,
)

D, E, K, TOKENS = 6, 8, 2, 64
CONFIG = MoEConfig(dim=D, hidden=4, num_experts=E, top_k=K)
PROPORTIONAL = LossFree(step=0.01, rule="proportional")
BALANCERS = [
    LossFree(step=0.01),
    PROPORTIONAL,
    Bip(),
    Quantile(),
    Quantile(rounds=0),
    EdgeQuantile(),
    Sinkhorn(),
    Cutoff(),
]
SPREADABLE = [LossFree(step=0.01), PROPORTIONAL, Quantile(), Quantile(rounds=0), EdgeQuantile(), Cutoff()]
Worlds = Callable[[int], World]


class Net(nn.Module):
    def __init__(self, balancer: Balancer, group: Any = None, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = replace(CONFIG, balancer=balancer, **more)
        self.first, self.second = (MoE(config, group, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.first(x)
        return y + self.second(y)  # type: ignore[no-any-return]

    @property
    def routers(self) -> list[Router]:
        return [self.first.router, self.second.router]


def batch(tokens: int = TOKENS, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pull = torch.randn(D, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64) + 2 * pull


def prices(model: nn.Module) -> list[list[float]]:
    return [module.price_E.tolist() for module in model.modules() if isinstance(module, Router)]


def statistics(model: nn.Module) -> list[dict[str, Tensor]]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [{name: stat.clone() for name, stat in router.stats.items()} for router in routers]
