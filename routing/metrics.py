"""How even a layer's load is: MaxVio and its family, the alarms, and Balance, one layer's reading in a step.

Every function reduces the last axis and keeps the others, so `load_LE` gives a number per layer. Numbers of several
layers are averaged, never the loads: four layers that collapsed on different experts look perfect when pooled. Only
`readings` waits for the device, so values are not checked (a load that is NaN reads as NaN); shapes are. A layer
without rows reads as even: nobody waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from placement import Placement
from routing.scores import at_least_fp32


def relative_load(load_E: Tensor) -> Tensor:
    """Each expert's load over the mean load; 1 for all where there are no rows. load_E [..., E] -> [..., E]."""
    if load_E.ndim == 0 or load_E.shape[-1] == 0:
        raise ValueError(f"a load is [..., experts] with at least one expert; got shape {tuple(load_E.shape)}")
    load_E = load_E.to(at_least_fp32(load_E.dtype))
    total = load_E.sum(dim=-1, keepdim=True)
    relative_E = load_E * load_E.shape[-1] / total.masked_fill(total == 0, 1)
    return relative_E.masked_fill(total == 0, 1)


def max_vio(load_E: Tensor) -> Tensor:
    """By how much the busiest expert exceeds the mean: max L / mean L - 1. [..., E] -> [...]."""
    return relative_load(load_E).amax(dim=-1) - 1


def cv(load_E: Tensor) -> Tensor:
    """Standard deviation over mean, over all experts (not a sample of them). [..., E] -> [...]."""
    return (relative_load(load_E) - 1).square().mean(dim=-1).sqrt()


def entropy(load_E: Tensor) -> Tensor:
    """Entropy of the shares over ln E: 1 when even, 0 when one expert has all. [..., E] -> [...]."""
    relative_E = relative_load(load_E)
    if relative_E.shape[-1] == 1:
        return torch.ones_like(relative_E[..., 0])
    return 1 - torch.xlogy(relative_E, relative_E).mean(dim=-1) / math.log(relative_E.shape[-1])


def gini(load_E: Tensor) -> Tensor:
    """Gini coefficient: 0 when even, 1 - 1/E when one expert has all. [..., E] -> [...]."""
    ascending_E = relative_load(load_E).sort(dim=-1).values
    num_experts = ascending_E.shape[-1]
    rank_E = torch.arange(1, num_experts + 1, device=ascending_E.device, dtype=ascending_E.dtype)
    return (ascending_E * (2 * rank_E - num_experts - 1)).sum(dim=-1) / num_experts**2


def dead(load_E: Tensor) -> Tensor:
    """Experts without a row. [..., E] -> [...], int64."""
    if load_E.ndim == 0:
        raise ValueError("a load is [..., experts]; got a single number")
    return (load_E == 0).sum(dim=-1)


def sum_f2(load_E: Tensor) -> Tensor:
    """E times the sum of squared shares: 1 when even, E when one expert has all; 1 + cv^2. [..., E] -> [...].

    What a balancing loss would read if the mean scores followed the loads; unlike it, this cannot be fooled by them.
    """
    return relative_load(load_E).square().mean(dim=-1)


def mean_score(score_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """The mean share of a token's score that goes to each expert; padding left out. [..., T, E] -> [..., E], sums to 1.

    valid_T: False for padding, None if there is none.
    """
    if score_TE.ndim < 2:
        raise ValueError(f"scores are [..., tokens, experts]; got shape {tuple(score_TE.shape)}")
    if valid_T is not None and valid_T.shape != score_TE.shape[:-1]:
        raise ValueError(
            f"valid_T has shape {tuple(valid_T.shape)}; the scores have {tuple(score_TE.shape[:-1])} tokens"
        )
    score_TE = score_TE.to(at_least_fp32(score_TE.dtype))
    tiny = torch.finfo(score_TE.dtype).tiny
    share_TE = score_TE / score_TE.sum(dim=-1, keepdim=True).clamp_min(tiny)
    if valid_T is not None:
        share_TE = share_TE.masked_fill(~valid_T[..., None], 0)
    total_E = share_TE.sum(dim=-2)
    return total_E / total_E.sum(dim=-1, keepdim=True).clamp_min(tiny)


def sum_fp(load_E: Tensor, mean_score_E: Tensor) -> Tensor:
    """What the Switch loss reads: E times the sum of share times mean score; 1 when either is even. [..., E] -> [...].

    mean_score_E: mean_score(...) of the same tokens.
    """
    _require_same("mean_score_E", mean_score_E, load_E)
    return (relative_load(load_E) * mean_score_E).sum(dim=-1)


def flat(load_E: Tensor, mean_score_E: Tensor, *, uneven: float = 1.25, seen: float = 0.1) -> Tensor:
    """The flat-P alarm: loads are uneven, but the mean scores are so flat that a balancing loss reads even.

    Scaling all logits down leaves the choice as it is and takes the loss to its minimum, 1. sum_fp - 1 is the
    covariance of loads and mean scores, sum_f2 - 1 the variance of loads: their ratio is the share of the imbalance
    that the loss sees. True where sum_f2 is at least `uneven` (1.25: cv is a half) and that share at most `seen`.
    [..., E] -> [...], bool.
    """
    spread = sum_f2(load_E)
    return (spread >= uneven) & (sum_fp(load_E, mean_score_E) - 1 <= seen * (spread - 1))


def drop_share(wanted_E: Tensor, load_E: Tensor) -> Tensor:
    """Share of the rows wanted that were dropped: 1 - kept / wanted; 0 where nobody wanted any. [..., E] -> [...].

    wanted_E: rows for each expert before capacity, load_E: after.
    """
    _require_same("wanted_E", wanted_E, load_E)
    real = at_least_fp32(load_E.dtype)
    wanted, kept = wanted_E.sum(dim=-1).to(real), load_E.sum(dim=-1).to(real)
    return (1 - kept / wanted.masked_fill(wanted == 0, 1)).masked_fill(wanted == 0, 0)


def rank_share(placement: Placement, device: torch.device | str = "cpu") -> Tensor:
    """The share of each expert's load that falls on each rank, its copies sharing evenly. -> share_RE."""
    return torch.from_numpy(placement.held_RE / placement.copies_E).to(device, torch.float32)


def rank_peak(load_E: Tensor, share_RE: Tensor) -> Tensor:
    """Load of the busiest rank over the mean of ranks, after placement; 1 where there are no rows. [..., E] -> [...].

    share_RE: the share of each expert's load that each rank computes, rank_share(...) for a placement.
    """
    if load_E.ndim == 0 or share_RE.ndim != 2 or share_RE.shape[1] != load_E.shape[-1]:
        raise ValueError(
            f"share_RE must be [ranks, experts] for a load of shape {tuple(load_E.shape)}; got {tuple(share_RE.shape)}"
        )
    load_R = torch.einsum("...e,re->...r", load_E.to(share_RE.dtype), share_RE)
    return relative_load(load_R).amax(dim=-1)


def price_spread(price_E: Tensor) -> Tensor:
    """The dearest expert's price less the cheapest's. [..., E] -> [...]."""
    if price_E.ndim == 0 or price_E.shape[-1] == 0:
        raise ValueError(f"prices are [..., experts] with at least one expert; got shape {tuple(price_E.shape)}")
    return price_E.amax(dim=-1) - price_E.amin(dim=-1)


def saturated(price_E: Tensor, score_range: float) -> Tensor:
    """The saturation alarm: prices lie at least as far apart as scores can, so the cheapest expert is always chosen
    before the dearest, whatever the token says.

    score_range: the largest score less the smallest that a router can give: 1 for sigmoid and softmax, infinite for
    scores without bounds. [..., E] -> [...], bool.
    """
    return price_spread(price_E) >= score_range


@dataclass(frozen=True, kw_only=True, eq=False)
class Balance:
    """One layer's reading in a step: scalars on the device, None for what nobody measured. `readings` brings them home.

    dual_gap: of a balancer that knows its bound. loss_share: of the whole loss, what this layer's balancing
    losses are.
    """

    max_vio: Tensor
    cv: Tensor
    entropy: Tensor
    gini: Tensor
    dead: Tensor
    sum_f2: Tensor
    price_spread: Tensor
    saturated: Tensor
    flat: Tensor | None = None
    drop_share: Tensor | None = None
    rank_peak: Tensor | None = None
    dual_gap: Tensor | None = None
    loss_share: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        load_E: Tensor,
        price_E: Tensor,
        *,
        score_range: float = 1.0,
        mean_score_E: Tensor | None = None,
        wanted_E: Tensor | None = None,
        share_RE: Tensor | None = None,
        dual_gap: Tensor | None = None,
        loss_share: Tensor | None = None,
    ) -> Self:
        """load_E: rows of the whole group, every micro-batch of the step. mean_score_E gives the flat-P alarm, wanted_E
        (rows before capacity) the dropped share, share_RE (a placement's) the peak of ranks."""
        if load_E.ndim != 1:
            raise ValueError(f"a reading is of one layer, load_E [experts]; got shape {tuple(load_E.shape)}")
        _require_same("price_E", price_E, load_E)
        return cls(
            max_vio=max_vio(load_E),
            cv=cv(load_E),
            entropy=entropy(load_E),
            gini=gini(load_E),
            dead=dead(load_E),
            sum_f2=sum_f2(load_E),
            price_spread=price_spread(price_E),
            saturated=saturated(price_E, score_range),
            flat=None if mean_score_E is None else flat(load_E, mean_score_E),
            drop_share=None if wanted_E is None else drop_share(wanted_E, load_E),
            rank_peak=None if share_RE is None else rank_peak(load_E, share_RE),
            dual_gap=dual_gap,
            loss_share=loss_share,
        )

    def measured(self) -> dict[str, Tensor]:
        """What was measured, by name; on the device."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}


def readings(balance_of: Mapping[str, Balance]) -> dict[str, dict[str, float]]:
    """layer -> metric -> number, for a sink. The one place that waits for the device: once for all layers."""
    measured = {layer: balance.measured() for layer, balance in balance_of.items()}
    every = [value for reading in measured.values() for value in reading.values()]
    if not every:
        return {}
    numbers = iter(torch.stack([value.to(every[0].device, torch.float32) for value in every]).tolist())
    return {layer: {name: next(numbers) for name in reading} for layer, reading in measured.items()}


def over_layers(reading_of: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Each metric over the layers that have it: its mean, median, 95th percentile and largest. A sink takes these too.

    reading_of: what `readings` gave. Numbers that are not finite are left out.
    """
    over: dict[str, dict[str, float]] = {"mean": {}, "p50": {}, "p95": {}, "max": {}}
    for name in dict.fromkeys(name for reading in reading_of.values() for name in reading):
        values = [reading[name] for reading in reading_of.values() if name in reading]
        if finite := [value for value in values if math.isfinite(value)]:
            value_L = torch.tensor(finite, dtype=torch.float64)
            over["mean"][name] = float(value_L.mean())
            over["p50"][name] = float(value_L.quantile(0.5))
            over["p95"][name] = float(value_L.quantile(0.95))
            over["max"][name] = max(finite)
    return over


def _require_same(name: str, given: Tensor, load_E: Tensor) -> None:
    if given.ndim == 0 or load_E.ndim == 0 or given.shape != load_E.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, the load {tuple(load_E.shape)}; give one per expert")
