"""Shares: how many experts the tokens of a sequence take on average, where experts choose. MaskRatio is a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from routing.select import Tokens

Shape = Literal["linear", "linear-reverse", "cosine", "cosine-reverse", "gaussian", "gaussian-reverse"]


class Share(Protocol):
    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError if top_k of num_experts cannot be shared out like this."""

    def most_k(self, top_k: int) -> int:
        """The largest k of any sequence: the host must know how many rows there can be."""

    def __call__(self, top_k: int, tokens: Tokens) -> Tensor | int:
        """k of each sequence, on average over its tokens. -> k_B, whole, or one number for all"""


@dataclass(frozen=True, kw_only=True)
class Constant(Share):
    """Every sequence takes the router's top_k."""

    def check(self, num_experts: int, top_k: int) -> None:
        pass

    def most_k(self, top_k: int) -> int:
        return top_k

    def __call__(self, top_k: int, tokens: Tokens) -> Tensor | int:
        return top_k


@dataclass(frozen=True, kw_only=True)
class MaskRatio(Share):
    """k follows the masked share r of a sequence of a diffusion model: round(least + (most - least) * h(r)).

        linear    h = r                          gaussian  h = exp(-(r - 1/2)^2 / (2 sigma^2)), moved and stretched
        cosine    h = (1 - cos(pi r)) / 2                  to be 0 at both edges and 1 in the middle

    "-reverse" is 1 - h. Over evenly spread r, linear and cosine take (least + most) / 2 on average: give the router
    that top_k. Ratios beyond 0 and 1 count as these; a MoE layer refuses them.
    """

    shape: Shape = "linear-reverse"
    least: int
    most: int
    sigma: float = 0.22

    def __post_init__(self) -> None:
        if self.shape not in (shapes := [name + end for name in _RISE for end in ("", "-reverse")]):
            raise ValueError(f"MaskRatio has no shape {self.shape!r}; use one of {', '.join(shapes)}")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"MaskRatio goes from least={self.least} to most={self.most}; use 1 <= least <= most")
        if not 0.01 <= self.sigma < math.inf:
            raise ValueError(f"MaskRatio has sigma={self.sigma}; use 0.01 or more")

    def check(self, num_experts: int, top_k: int) -> None:
        if self.most > num_experts:
            raise ValueError(f"MaskRatio takes up to {self.most} of {num_experts} experts; use most <= num_experts")
        if not self.least <= top_k <= self.most:
            raise ValueError(
                f"top_k={top_k}, but MaskRatio takes {self.least} to {self.most} experts; give the router their mean"
            )

    def most_k(self, top_k: int) -> int:
        return self.most

    def __call__(self, top_k: int, tokens: Tokens) -> Tensor | int:
        if tokens.ratio_B is None:
            raise ValueError(
                "MaskRatio needs the masked share of each sequence; call the layer with ratio= (a router with ratio_B=)"
            )
        return self.k(tokens.ratio_B)

    def k(self, ratio: Tensor) -> Tensor:
        """In fp64, as a half type would round to another k. -> int64, of the shape of ratio"""
        ratio = ratio.double().nan_to_num(nan=0.0).clamp(0, 1)
        name, _, reverse = self.shape.partition("-")
        rise = _RISE[name](ratio, self.sigma)
        rise = 1 - rise if reverse else rise
        return (self.least + (self.most - self.least) * rise).round().long()


def _gaussian(ratio: Tensor, sigma: float) -> Tensor:
    edge = math.exp(-0.125 / sigma**2)
    return (torch.exp(-((ratio - 0.5) ** 2) / (2 * sigma**2)) - edge) / (1 - edge)


_RISE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda ratio, _: ratio,
    "cosine": lambda ratio, _: (1 - torch.cos(math.pi * ratio)) / 2,
    "gaussian": _gaussian,
}
