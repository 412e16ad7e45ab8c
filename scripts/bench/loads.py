"""Loads: named streams of choices, the same for every candidate of a benchmark, drawn from a seed.

Experts are at home in order: rank r has the r-th run of experts / ranks. All choices of a token are distinct, so one
expert alone cannot have more than 1 / top_k of all rows: `95:4` with top-4 is the steepest load a real router can make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """How many of everything. tokens: of each rank."""

    ranks: int
    experts: int
    top_k: int
    tokens: int

    @property
    def per_rank(self) -> int:
        return self.experts // self.ranks


Draw = Callable[[Case, int, int, torch.Generator], Tensor]
"""(case, step, rank, generator) -> expert_TK"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """draw: the choices of one rank in one step. steps: after how many it begins again."""

    what: str
    draw: Draw
    steps: int = 1

    def choices(self, case: Case, rank: int, seed: int = 0) -> list[Tensor]:
        """expert_TK of this rank, step after step."""
        drawn = []
        for step in range(self.steps):
            generator = torch.Generator().manual_seed(1000 * seed + 100 * step + rank)
            drawn.append(self.draw(case, step, rank, generator))
        return drawn


def popular(log_E: Tensor, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """top_k distinct experts for each token, each drawn in proportion to exp(log_E) of those left (Gumbel)."""
    uniform_TE = torch.rand(tokens, len(log_E), generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return (log_E - (-uniform_TE.log()).log()).topk(top_k, dim=-1).indices


def even(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    return popular(torch.zeros(case.experts), case.tokens, case.top_k, generator)


def into(share: float, hot: int, first: int = 0) -> Draw:
    """A share of the tokens takes the `hot` experts from `first` on, each once, and draws the rest of its top-k."""

    def draw(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
        log_TE = torch.zeros(case.tokens, case.experts, dtype=torch.float64)
        chosen = torch.arange(first, first + hot) % case.experts
        log_TE[: round(share * case.tokens), chosen] = 1000.0
        uniform_TE = torch.rand(log_TE.shape, generator=generator, dtype=torch.float64).clamp_min(1e-12)
        return (log_TE - (-uniform_TE.log()).log()).topk(case.top_k, dim=-1).indices

    return draw


def hot_rank(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    """95 % of the tokens choose among the first rank's experts only."""
    expert_TK = even(case, step, rank, generator)
    hot = round(0.95 * case.tokens)
    expert_TK[:hot] = popular(torch.zeros(case.per_rank), hot, case.top_k, generator)
    return expert_TK


def zero_rank(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    """Nobody chooses an expert of the last rank."""
    return popular(torch.zeros(case.experts - case.per_rank), case.tokens, case.top_k, generator)


def idle_rank(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    """The last rank has no tokens of its own."""
    return even(case, step, rank, generator)[: 0 if rank == case.ranks - 1 else case.tokens]


def burst(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    """Even, but for one step."""
    return (into(0.95, 4) if step == 2 else even)(case, step, rank, generator)


def rotation(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    """Four hot experts, at home on another rank in each step."""
    return into(0.8, 4, step * case.per_rank)(case, step, rank, generator)


def zipf(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    """Popularity as one over the rank in it to the 1.2, the popular ones scattered over the ranks."""
    return popular(_zipf_E(case), case.tokens, case.top_k, generator)


def drift(case: Case, step: int, rank: int, generator: torch.Generator) -> Tensor:
    """Zipf, whose popularities wander from step to step."""
    walk = torch.Generator().manual_seed(7)
    wander_SE = 0.7 * torch.randn(step + 1, case.experts, generator=walk, dtype=torch.float64)
    return popular(_zipf_E(case) + wander_SE.sum(dim=0), case.tokens, case.top_k, generator)


def _zipf_E(case: Case) -> Tensor:
    order_E = torch.randperm(case.experts, generator=torch.Generator().manual_seed(3))
    return -1.2 * torch.log1p(order_E.to(torch.float64))


LOADS: dict[str, Load] = {
    "bal": Load(what="every expert alike likely", draw=even),
    "50:1": Load(what="half of the tokens take expert 0", draw=into(0.5, 1)),
    "95:1": Load(what="95 % of the tokens take expert 0", draw=into(0.95, 1)),
    "95:4": Load(what="95 % of the tokens take experts 0 to 3", draw=into(0.95, 4)),
    "hot-rank": Load(what="95 % of the tokens choose among rank 0's experts", draw=hot_rank),
    "zero-rank": Load(what="nobody chooses the last rank's experts", draw=zero_rank),
    "idle-rank": Load(what="the last rank has no tokens", draw=idle_rank),
    "zipf": Load(what="Zipf, 1.2", draw=zipf),
    "burst": Load(what="even, but for one step of four", draw=burst, steps=4),
    "rotation": Load(what="80 % into four experts, which change rank each step", draw=rotation, steps=2),
    "drift": Load(what="Zipf whose popularities wander", draw=drift, steps=3),
}
