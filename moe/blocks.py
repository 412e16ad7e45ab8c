"""Blocks: SwiGLU experts in C++, and the sum over a token's rows. Where it is not built, other computes do the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe.activation import Activation, SwiGLU
from moe.stack import Back, Rows, Stack
from routing import Library

_TORCH = Path(torch.__file__).parent
KERNELS = Library(
    name="kernels",
    sources=(Path(__file__).parent / "blocks.cpp",),
    functions={},  # they are torch operators
    flags=(
        f"-DTORCH_WAS={torch.__version__}",  # a binary fits one torch alone
        *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
        *("-isystem", str(_TORCH / "include"), "-isystem", str(_TORCH / "include/torch/csrc/api/include")),
    ),
    links=(f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
)
_TYPES = (torch.float32, torch.bfloat16)


def blocks_refuse(stack: Stack, activation: Activation) -> str | None:
    """Why not, if they do."""
    up, down, *biases = stack
    if up.device.type != "cpu" or up.dtype not in _TYPES or down.dtype != up.dtype:
        return f"it takes fp32 and bf16 on a CPU; got {up.dtype} on {up.device}"
    biased = any(bias is not None for bias in biases)
    if type(activation) is not SwiGLU or biased:
        return f"it takes SwiGLU without biases; got {activation}{' and biases' if biased else ''}"
    if not {type(up), type(down)} <= {Tensor, nn.Parameter}:
        return f"it takes plain tensors; got {type(up).__name__}"
    return None if KERNELS.load() is not None else KERNELS.in_use()


@dataclass(frozen=True)
class Blocks:
    """The rows of a whole stack, rows_A for each of its experts."""

    rows: slice
    rows_A: tuple[int, ...]

    def forward(
        self,
        x: Rows,
        stack: Stack,
        activation: Activation,
        *,
        h_MF: Tensor | None,
        result_MD: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor]:
        source_XD, num_rows = x.source_XD.contiguous(), self.rows.stop - self.rows.start
        if keep and h_MF is None:
            h_MF = source_XD.new_empty(num_rows, stack.up.shape[1])
        if result_MD is None:
            result_MD = source_XD.new_empty(num_rows, stack.down.shape[1])
        index_M = None if x.index_M is None else x.index_M[self.rows]
        source_XD = source_XD if x.index_M is not None else source_XD[self.rows]
        torch.ops.evenmoe.forward(source_XD, index_M, self.rows_A, stack.up, stack.down, h_MF, result_MD)
        return h_MF, result_MD

    def backward(self, back: Back, stack: Stack, activation: Activation) -> None:
        dup, ddown = back.grads[:2]
        torch.ops.evenmoe.backward(
            back.g.source_XD.contiguous(),
            back.x.source_XD.contiguous(),
            back.x.index_M,
            self.rows_A,
            self.rows.start,
            stack.up,
            stack.down,
            back.h_MF,
            None if back.weight_M is None else back.weight_M.contiguous(),
            back.dweight_M,
            dup,
            ddown,
            back.drow_XD,
        )


def total(row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor | None) -> Tensor | None:
    """Of each token the (weighted) rows, added in fp32 in their order. None where the compiled path cannot."""
    plain = type(row_XD) is Tensor and row_XD.device.type == "cpu" and row_XD.dtype in _TYPES
    narrow = weight_TK is None or weight_TK.dtype == torch.float32
    if not (plain and narrow) or KERNELS.load() is None:
        return None
    weight_TK = None if weight_TK is None else weight_TK.contiguous()
    y_TD = row_XD.new_empty(len(place_TK), row_XD.shape[1])
    torch.ops.evenmoe.total(row_XD.contiguous(), place_TK.contiguous(), weight_TK, y_TD)
    return y_TD
