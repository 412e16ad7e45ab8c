"""From the router's logits to scores: how much each token wants each expert. Always in fp32 or better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Score(Protocol):
    range: ClassVar[float] = math.inf
    """The largest score less the smallest that it can give."""

    def __call__(self, logit_TE: Tensor) -> Tensor:
        """logit_TE -> score_TE"""

    def logits(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """The likeness of each token to each expert, both in fp32 or better. -> logit_TE"""
        return F.linear(x_TD, weight_ED)


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


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
