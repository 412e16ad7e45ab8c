"""Batch: what a layer is called with, and how all ranks learn that one of them was called with something wrong."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing import Choice


class Batch(NamedTuple):
    """A layer's input, a line for each token."""

    x_TD: Tensor
    valid_T: Tensor | None
    ratio_B: Tensor | None
    length: int

    @classmethod
    def of(cls, x: Tensor, valid: Tensor | None, ratio: Tensor | None) -> Self:
        return cls(
            x_TD=x.reshape(-1, x.shape[-1]),
            valid_T=None if valid is None else valid.reshape(-1),
            ratio_B=None if ratio is None else ratio.reshape(-1),
            length=x.shape[-2] if x.ndim > 1 else 1,
        )


def problem_of(x: Tensor, valid: Tensor | None, ratio: Tensor | None, dim: int, weight: Tensor) -> str | None:
    """What is wrong with a layer's input, if anything. weight: any of the experts'."""
    if x.ndim < 1 or x.shape[-1] != dim:
        return f"the layer takes [..., {dim}]; got {list(x.shape)}"
    if off := [part.device for part in (x, valid, ratio) if part is not None and part.device != weight.device]:
        return f"the input is on {off[0]}, the layer on {weight.device}; valid and ratio count as input"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"the input is {x.dtype}, the layer {weight.dtype}; convert one, or use torch.autocast"
    if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:-1]):
        return f"valid must be bool and {list(x.shape[:-1])}; got {valid.dtype} and {list(valid.shape)}"
    if ratio is not None and (not ratio.is_floating_point() or ratio.shape != x.shape[:-2]):
        return f"ratio must be floating point and {list(x.shape[:-2])}; got {ratio.dtype} and {list(ratio.shape)}"
    return None


def header(
    choice: Choice | None, ratio_B: Tensor | None, grad_wanted: bool, price_E: Tensor, learning: int = 0
) -> Tensor:
    """What every rank must know: rows for each expert; then tokens with bad logits, no choice made, ratios that are
    none, which weights of experts learn, grad wanted.

    price_E: the router's. learning: a bit for each weight.
    """
    num_experts = len(price_E)
    head_F = torch.zeros(num_experts + 5, dtype=torch.int64, device=price_E.device)
    if choice is None:
        head_F[num_experts + 1] = 1
    else:
        head_F[:num_experts] = choice.load_E
        head_F[num_experts] = _count_nonfinite(choice)
    if choice is not None and ratio_B is not None:
        head_F[num_experts + 2] = (~((ratio_B >= 0) & (ratio_B <= 1))).sum()
    head_F[num_experts + 3] = learning
    head_F[num_experts + 4] = int(grad_wanted)
    return head_F


def raise_alike(flag_RF: NDArray[np.int64], problem: str | Exception | None, rank: int) -> None:
    """flag_RF: tokens with non-finite logits, choices not made and ratios that are none, by rank. problem: why this
    rank made none; an exception that is no ValueError is raised here as it is, while the others get one."""
    if (refused := np.flatnonzero(flag_RF[:, 1])).size:
        if isinstance(problem, Exception) and not isinstance(problem, ValueError):
            raise problem
        ranks = ", ".join(map(str, refused.tolist()))
        raise ValueError(f"bad input on rank {ranks}: {problem or f'all ranks stop with it (this is rank {rank})'}")
    if (bad := np.flatnonzero(flag_RF[:, 0])).size:
        raise ValueError(
            f"NaN or Inf in the router's logits: {flag_RF[bad, 0].tolist()} tokens on ranks {bad.tolist()}; "
            f"look for it in the layer's input and in router.weight"
        )
    if (bad := np.flatnonzero(flag_RF[:, 2])).size:
        raise ValueError(
            f"ratio must be between 0 and 1; {flag_RF[bad, 2].tolist()} sequences on ranks {bad.tolist()} have another"
        )


def raise_if_unlike(learning_R: NDArray[np.int64]) -> None:
    """Where experts visit, their gradients travel: every rank must send and expect the same ones."""
    if len(set(learning_R.tolist())) > 1:
        odd = np.flatnonzero(learning_R != learning_R[0]).tolist()
        raise ValueError(
            f"other weights of the experts learn on ranks {odd} than on rank 0, and experts visit: freeze the same "
            f"ones on every rank, or use AtHome()"
        )


def _count_nonfinite(choice: Choice) -> Tensor:
    bad_T = (choice.logit_TE.detach() * 0).sum(dim=-1) != 0  # not finite, times zero, is NaN
    return (bad_T if choice.valid_T is None else bad_T & choice.valid_T).sum()
