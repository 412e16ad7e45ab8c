"""Batch: what a layer is called with, and how all ranks learn that one of them was called with something wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from routing import Choice

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PART, _TYPE = 4, 8  # where in a manner they begin; below, a bit for each of the experts' weights


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
    if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        return f"the input is {x.dtype}, the layer {weight.dtype}; convert one, or use torch.autocast"
    if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:-1]):
        return f"valid must be bool and {list(x.shape[:-1])}; got {valid.dtype} and {list(valid.shape)}"
    if ratio is not None and (not ratio.is_floating_point() or ratio.shape != x.shape[:-2]):
        return f"ratio must be floating point and {list(x.shape[:-2])}; got {ratio.dtype} and {list(ratio.shape)}"
    return None


def manner(weights: Iterable[Tensor], router: nn.Module, dtype: torch.dtype) -> int:
    """How a rank takes part in a step, in one number for `raise_if_unlike`. weights: the experts'. dtype: in which they
    compute."""
    if not torch.is_grad_enabled():
        return _TYPES.index(dtype) << _TYPE if dtype in _TYPES else 0
    bits = [weight.requires_grad for weight in weights]
    learning = sum(learns << bit for bit, learns in enumerate(bits))
    part = 2 if any(weight.requires_grad for weight in router.parameters()) else int(any(bits))
    return learning + (part << _PART) + (_TYPES.index(dtype) << _TYPE if dtype in _TYPES else 0)


def header(
    choice: Choice | None, ratio_B: Tensor | None, grad_wanted: bool, price_E: Tensor, manner: int = 0
) -> Tensor:
    """What every rank must know: rows for each expert; then bad tokens, no choice made, ratios that are
    none, its manner, grad wanted. price_E: the router's."""
    num_experts = len(price_E)
    head_F = torch.zeros(num_experts + 5, dtype=torch.int64, device=price_E.device)
    if choice is None:
        head_F[num_experts + 1] = 1
    else:
        head_F[:num_experts] = choice.load_E
        head_F[num_experts] = bad_of(choice, price_E)
    if choice is not None and ratio_B is not None:
        head_F[num_experts + 2] = (~((ratio_B >= 0) & (ratio_B <= 1))).sum()
    head_F[num_experts + 3] = manner
    head_F[num_experts + 4] = int(grad_wanted)
    return head_F


def raise_alike(flag_RF: NDArray[np.int64], problem: str | Exception | None, rank: int) -> None:
    """flag_RF: bad tokens, choices not made and ratios that are none, by rank. problem: why this rank made none; an
    exception that is no ValueError is raised here as it is, while the others get one. Whoever calls drops it, too: in a
    frame that its traceback holds, it would keep the batch in memory after somebody caught it."""
    try:
        if (refused := np.flatnonzero(flag_RF[:, 1])).size:
            if isinstance(problem, Exception) and not isinstance(problem, ValueError):
                raise problem
            ranks = ", ".join(map(str, refused.tolist()))
            said = f"bad input on rank {ranks}: {problem or f'all ranks stop with it (this is rank {rank})'}"
            raise ValueError(said) from (problem if isinstance(problem, Exception) else None)
    finally:
        del problem
    if (bad := np.flatnonzero(flag_RF[:, 0])).size:
        raise ValueError(
            f"NaN or Inf in the router's logits or prices: {flag_RF[bad, 0].tolist()} tokens on ranks {bad.tolist()}; "
            f"look for it in the layer's input, in router.weight and in router.price_E"
        )
    if (bad := np.flatnonzero(flag_RF[:, 2])).size:
        raise ValueError(
            f"ratio must be between 0 and 1; {flag_RF[bad, 2].tolist()} sequences on ranks {bad.tolist()} have another"
        )


def raise_if_unlike(manner_R: NDArray[np.int64], *, moving: bool, grad_wanted: bool) -> None:
    """Rows and gradients travel: every rank must send and expect the same ones, of one type. moving: do experts visit
    or have copies? grad_wanted: does any rank's input want a gradient? If not, a rank may have no part in backward."""
    if (odd := _unlike(type_R := manner_R >> _TYPE)).size:
        raise ValueError(
            f"ranks {odd.tolist()} compute in {_TYPES[type_R[odd[0]]]}, rank 0 in {_TYPES[type_R[0]]}; use one type, "
            f"and torch.autocast on every rank or on none"
        )
    if moving and (odd := _unlike(manner_R & ((1 << _PART) - 1))).size:
        raise ValueError(
            f"other weights of the experts learn on ranks {odd.tolist()} than on rank 0, and experts visit or have "
            f"copies: freeze the same ones on every rank, or use AtHome() and no copies"
        )
    if not grad_wanted and (odd := _unlike(manner_R >> _PART)).size:
        raise ValueError(
            f"the router, or every weight, is frozen on ranks {odd.tolist()} and not on rank 0, or the other way "
            f"round: backward would wait for ranks that have none; freeze the same ones on every rank, and use "
            f"torch.no_grad on all or on none"
        )


def _unlike(what_R: NDArray[np.int64]) -> NDArray[np.intp]:
    """The ranks that differ from the first."""
    return np.flatnonzero(what_R != what_R[0])


def bad_of(choice: Choice, price_E: Tensor) -> Tensor:
    """The number of tokens that were chosen for by what is no number. price_E: the router's; infinite ones are prices,
    of experts that nobody is to take."""
    bad_T = (choice.logit_TE.detach() * 0).sum(dim=-1) != 0  # not finite, times zero, is NaN
    bad_T = bad_T | price_E.isnan().any()
    return (bad_T if choice.valid_T is None else bad_T & choice.valid_T).sum()
