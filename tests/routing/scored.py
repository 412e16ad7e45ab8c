"""Scores to balance: the fixtures that all balancers are measured on, and what they are measured by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from routing import Choice, Tokens, TopK
from routing.balancer import Balancer

NO_STEPS = torch.zeros((), dtype=torch.int64)

# Eight tokens, four experts, one each: the lower ends come to rest at 4.92 and loads (3, 3, 2, 0); the best is 4.88.
STALL = torch.tensor(
    [
        [0.90, 0.40, 0.30, 0.20],
        [0.85, 0.55, 0.25, 0.15],
        [0.80, 0.30, 0.35, 0.10],
        [0.70, 0.65, 0.20, 0.25],
        [0.50, 0.75, 0.40, 0.30],
        [0.45, 0.72, 0.55, 0.20],
        [0.30, 0.68, 0.61, 0.35],
        [0.25, 0.40, 0.66, 0.45],
    ],
    dtype=torch.float64,
)


def scored(logit_TE: Tensor, score: str) -> Tensor:
    return {"softmax": logit_TE.softmax(dim=1), "sigmoid": logit_TE.sigmoid(), "logit": logit_TE}[score]


def popular(num_tokens: int, num_experts: int, seed: int = 0, score: str = "softmax") -> Tensor:
    """Each token's own taste and the experts' popularity, alike in weight. score_TE, float64"""
    rng = np.random.default_rng(seed)
    logit_TE = rng.standard_normal((num_tokens, num_experts)) + rng.standard_normal(num_experts)
    return scored(torch.from_numpy(logit_TE), score)


def drifting(
    num_experts: int, num_tokens: int, steps: int, score: str = "softmax", *, drift: float = 0.02, seed: int = 1
) -> Iterator[Tensor]:
    """Batches whose experts' popularity wanders, as a router's does in training."""
    rng = np.random.default_rng(seed)
    popular_E = rng.standard_normal(num_experts)
    for _ in range(steps):
        popular_E = np.sqrt(1 - drift**2) * popular_E + drift * rng.standard_normal(num_experts)
        yield scored(torch.from_numpy(rng.standard_normal((num_tokens, num_experts)) + popular_E), score)


def unlike() -> list[Tensor]:
    """Two micro-batches of one step that want quite different prices; 16 experts."""
    rng, shape = np.random.default_rng(0), (2048, 16)
    calm_TE = rng.standard_normal(shape) * 0.3 + 1.5 * rng.standard_normal(16)
    wild_TE = rng.standard_normal(shape) * 2.0 - 1.5 + 0.2 * rng.standard_normal(16)
    return [torch.from_numpy(logit_TE).sigmoid() for logit_TE in (calm_TE, wild_TE)]


def choose(score_TE: Tensor, price_E: Tensor, top_k: int, valid_T: Tensor | None = None) -> Choice:
    """The top-k at these prices, as the Router tells it."""
    rows = TopK()(score_TE, price_E, top_k, Tokens(valid_T, len(score_TE)))
    expert_N = rows.expert_N if valid_T is None else rows.expert_N.where(valid_T[rows.token_N], -1)
    return Choice(
        token_N=rows.token_N,
        expert_N=expert_N,
        wanted_N=expert_N,
        weight_N=score_TE[rows.token_N, expert_N.clamp(min=0)].where(expert_N >= 0, 0.0),
        score_TE=score_TE,
        logit_TE=score_TE,
        price_E=price_E,
        valid_T=valid_T,
        length=max(len(score_TE), 1),
        top_k=top_k,
        k=top_k,
    )


def quoted(
    balancer: Balancer, score_TE: Tensor, top_k: int, price_E: Tensor | None = None, valid_T: Tensor | None = None
) -> Tensor:
    """What it quotes this batch from these standing prices, which are 0 if none are given."""
    price_E = torch.zeros(score_TE.shape[1]) if price_E is None else price_E
    return balancer.quote(score_TE, price_E, top_k, valid_T=valid_T, settled=NO_STEPS)


def observed(balancer: Balancer, choices: list[Choice], price_E: Tensor) -> dict[str, Tensor]:
    """The statistics of a step of these choices, summed as the Router sums them."""
    shapes = {"load_E": (len(price_E),), "tokens": (), **balancer.shapes(len(price_E))}
    stats = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for choice in choices:
        seen = {"load_E": choice.wanted_E, "tokens": torch.as_tensor(choice.tokens)}
        for name, value in {**seen, **balancer.observe(choice, price_E)}.items():
            assert value.shape == stats[name].shape, f"{name} has shape {tuple(value.shape)}, not as announced"
            stats[name] += value
    return stats


def step(
    balancer: Balancer, scores: list[Tensor], price_E: Tensor, top_k: int, settled: int = 0
) -> tuple[Tensor, list[Choice]]:
    """One optimiser step of these micro-batches. -> the new standing prices, what was chosen"""
    count = torch.tensor(settled)
    choices = []
    for score_TE in scores:
        quoted_E = balancer.quote(score_TE, price_E, top_k, valid_T=None, settled=count)
        choices.append(choose(score_TE, quoted_E, top_k))
    return balancer.settle(price_E, observed(balancer, choices, price_E), top_k, settled=count), choices


def max_violation(*choices: Choice) -> float:
    """By how much the fullest expert exceeds the mean load, relative to it."""
    load_E = torch.stack([choice.load_E for choice in choices]).sum(dim=0).double()
    return float(load_E.max() / load_E.mean() - 1)


def violations(balancer: Balancer, batches: Iterator[Tensor], num_experts: int, top_k: int) -> list[float]:
    """Of each batch, one a step."""
    price_E, seen = torch.zeros(num_experts), []
    for settled, score_TE in enumerate(batches):
        price_E, choices = step(balancer, [score_TE], price_E, top_k, settled)
        seen.append(max_violation(*choices))
    return seen
