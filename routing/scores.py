"""From the router's logits to scores: how much each token wants each expert. Always in fp32 or better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from routing.likeness import likeness


class Score(Protocol):
    range: ClassVar[float] = math.inf
    """The largest score less the smallest that it can give."""

    def __call__(self, logit_TE: Tensor) -> Tensor:
        """logit_TE -> score_TE"""

    def logits(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """The likeness of each token to each expert. -> logit_TE, computed in fp32 or better"""
        return likeness(x_TD, weight_ED, at_least_fp32(x_TD.dtype))


@dataclass(frozen=True, kw_only=True)
class Softmax(Score):
    """The experts of a token compete: its scores sum to 1."""

    range: ClassVar[float] = 1.0

    def __call__(self, logit_TE: Tensor) -> Tensor:
        return logit_TE.to(at_least_fp32(logit_TE.dtype)).softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Score):
    """Each expert is scored alone, between 0 and 1."""

    range: ClassVar[float] = 1.0

    def __call__(self, logit_TE: Tensor) -> Tensor:
        return logit_TE.to(at_least_fp32(logit_TE.dtype)).sigmoid()


@dataclass(frozen=True, kw_only=True)
class SqrtSoftplus(Score):
    """sqrt(log(1 + exp(z))): each expert is scored alone, above 0 and without an upper bound."""

    def __call__(self, logit_TE: Tensor) -> Tensor:
        """Below -40, exp(z / 2) is the same to fp64, and has a gradient where softplus would be 0."""
        logit_TE = logit_TE.to(at_least_fp32(logit_TE.dtype))
        softplus_TE = -F.logsigmoid(-logit_TE.clamp(min=-40))  # F.softplus errs by 2e-9 above 20
        return torch.where(logit_TE < -40, (logit_TE.clamp(max=-40) / 2).exp(), softplus_TE.sqrt())


@dataclass(frozen=True, kw_only=True)
class Cosine(Softmax):
    """Softmax of the cosine between token and expert over a temperature: lengths have no part in it.

    A token or expert of zeros is at right angles to all others, and gets no gradient.
    """

    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"Cosine has temperature={self.temperature}; use more than 0, such as 0.07")

    def logits(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        dtype = at_least_fp32(x_TD.dtype)
        return F.linear(_unit(x_TD.to(dtype)), _unit(weight_ED.to(dtype))) / self.temperature


def _unit(x_TD: Tensor) -> Tensor:
    """Lines of length 1, or of zeros: scaled by the largest entry first, whose square could be lost or overflow."""
    x_TD = x_TD / _or_inf(x_TD.detach().abs().amax(dim=-1, keepdim=True))
    return x_TD / _or_inf(torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True))


def _or_inf(length_T1: Tensor) -> Tensor:
    return length_T1.where(length_T1 != 0, float("inf"))


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
