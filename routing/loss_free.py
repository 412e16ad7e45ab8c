"""LossFree: after each step, experts with too many rows become dearer and those with too few cheaper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from routing.balancer import Balancer
from routing.dual import check_top_k


@dataclass(frozen=True, kw_only=True)
class LossFree(Balancer):
    """A step down the dual once per optimiser step, from the loads alone; nothing is added to the loss.

    rule: "sign" moves every price by the step, whatever the excess; "proportional" by the step times the excess over
    the mean load. Step t, counted from 0, is step / (1 + t) ** decay, but never less than floor: with fixed scores a
    decay of 1 converges, but a router that keeps learning needs prices that keep up. centred: keep the mean price at 0.

    The step is in units of the scores: 1e-3 suits sigmoid scores, and is much for a softmax over many experts.
    """

    step: float = 1e-3
    rule: Literal["sign", "proportional"] = "sign"
    decay: float = 0.0
    floor: float = 0.0
    centred: bool = False

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise ValueError(f"LossFree(step={self.step}): prices would not go up for overloaded experts; use step > 0")
        if not self.decay >= 0:
            raise ValueError(f"LossFree(decay={self.decay}): steps would grow; use 0 for steps that stay the same")
        if not 0 <= self.floor <= self.step:
            raise ValueError(f"LossFree(floor={self.floor}): use 0 <= floor <= step, which is {self.step}")
        if self.rule not in ("sign", "proportional"):
            raise ValueError(f"LossFree knows no rule {self.rule!r}; use 'sign' or 'proportional'")

    def check(self, num_experts: int, top_k: int) -> None:
        check_top_k(num_experts, top_k)

    def settle(self, price_E: Tensor, stats: Mapping[str, Tensor], top_k: int, *, settled: Tensor) -> Tensor:
        load_E = stats["load_E"]
        mean = load_E.mean()
        excess_E = load_E - mean
        direction_E = excess_E.sign() if self.rule == "sign" else excess_E / mean.where(mean > 0, 1.0)
        step = (self.step * (1.0 + settled.double()) ** -self.decay).clamp(min=self.floor)
        moved_E = price_E.double() + step * direction_E
        if self.centred:
            moved_E = moved_E - moved_E.mean()
        return torch.where(stats["tokens"] > 0, moved_E.to(price_E.dtype), price_E)
