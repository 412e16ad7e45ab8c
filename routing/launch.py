"""Launch: the kernel of kernels.py, given tensors. No launch waits for the device, and no shape depends on a value.

No GPU has run it yet: it was tested in Triton's interpreter and compiled for Hopper.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from routing.native import is_python_only

DEVICE = "cuda"  # tests say "cpu", where TRITON_INTERPRET=1 was set before Triton was imported
MOST_K = 32  # each choice is a pass over the experts; for more, torch sorts
MOST_EXPERTS = 4096  # of a token, as 64-bit numbers in the registers of one program
WARPS = 4


class Decided(NamedTuple):
    expert_TK: Tensor
    weight_TK: Tensor
    load_E: Tensor


@cache
def _kernels() -> ModuleType | None:
    return importlib.import_module("routing.kernels") if importlib.util.find_spec("triton") else None


@cache
def _able(device: torch.device) -> bool:
    """Whether it can be built here, tried once: Triton wants a C compiler, and nobody was asked to have one."""
    try:
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)  # before Ampere
        if old or _kernels() is None:
            return False
        choose(torch.zeros(1, 2, device=device), torch.zeros(2, device=device), 1)
    except Exception as failure:
        warnings.warn(f"torch chooses experts, as Triton cannot: {failure}", RuntimeWarning, stacklevel=2)
        return False
    return True


def is_plain(*tensors: Tensor) -> bool:
    """Whether they are fp32 numbers in memory that others may read and write: no subclass, trace or transformation.

    Nor under a mode, whatever it is: one that has no values has none for a kernel, and selective checkpointing may hand
    out again the memory that a kernel wrote to behind its back.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(tensor) is Tensor and tensor.dtype == torch.float32 for tensor in tensors)


def kernel_takes(score_TE: Tensor, price_E: Tensor, top_k: int) -> bool:
    """Plain tensors on one GPU, and as many choices and experts as fit; the rest is torch's."""
    device, (tokens, experts) = score_TE.device, score_TE.shape
    if not is_plain(score_TE, price_E) or is_python_only() or device.type != DEVICE or price_E.device != device:
        return False
    fits = tokens > 0 and price_E.shape == (experts,) and experts <= MOST_EXPERTS
    return fits and 1 <= top_k <= min(experts, MOST_K) and _able(device)


def tokens_at_once(experts: int) -> int:
    """Tokens of a program: with 16 numbers a thread the registers hold them all."""
    return max(512 * WARPS // experts, 1)


def choose(score_TE: Tensor, price_E: Tensor, top_k: int) -> Tensor:
    """By score less price. -> expert_TK, best first; of equals the lowest expert. NaN is the greatest."""
    expert_TK = score_TE.new_empty(len(score_TE), top_k, dtype=torch.int64)
    _launch(score_TE, price_E, None, (expert_TK, None, None))
    return expert_TK


def decide(
    score_TE: Tensor, price_E: Tensor, top_k: int, valid_T: Tensor | None, normalize: bool, scale: float
) -> Decided:
    """As `choose`, and at once the weights and the rows of each expert; -1, 0 and none for padding."""
    tokens, experts = score_TE.shape
    out = Decided(
        score_TE.new_empty(tokens, top_k, dtype=torch.int64),
        score_TE.new_empty(tokens, top_k),
        score_TE.new_zeros(experts, dtype=torch.int64),
    )
    _launch(score_TE, price_E, valid_T, out, normalize, scale)
    return out


def _launch(
    score_TE: Tensor,
    price_E: Tensor,
    valid_T: Tensor | None,
    out: tuple[Tensor, Tensor | None, Tensor | None],
    normalize: bool = False,
    scale: float = 1.0,
) -> None:
    kernels: Any = _kernels()
    (tokens, experts), top_k = score_TE.shape, out[0].shape[1]
    wide = kernels.triton.next_power_of_2(experts)
    at_once = tokens_at_once(wide)
    with torch.cuda.device_of(score_TE):  # type: ignore[no-untyped-call]
        kernels.decide[(-(-tokens // at_once),)](
            score_TE, price_E.contiguous(), None if valid_T is None else valid_T.contiguous().view(torch.uint8), *out,
            tokens, experts, *score_TE.stride(), float(scale), PADDED=valid_T is not None, WHOLE=out[1] is not None,
            NORMALIZED=normalize, TOP_K=top_k, CHOICES=kernels.triton.next_power_of_2(top_k), TOKENS=at_once,
            EXPERTS=wide, num_warps=WARPS,
            enable_fp_fusion=True,  # the default, but Triton 3.9 warns where it is not said
        )  # fmt: skip
