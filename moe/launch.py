"""Launch: the kernels of kernels.py, given tensors. Where Triton is not, `kernels_refuse` says so.

No launch waits for the device: how many rows an expert has is read there, and grids come from shapes alone. Tiles are
chosen by a table, not by timing, so every rank and every run adds in one order. No GPU has run this yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.stack import Rows, Stack

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUP = 8
_WIDTH = 1024


@cache
def _kernels() -> ModuleType | None:
    return importlib.import_module("moe.kernels") if importlib.util.find_spec("triton") else None


def kernels_refuse(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Why not, if they do. On a CPU they run where TRITON_INTERPRET=1 was set before Triton was imported, for tests.

    dtype: that of the tensors it is to go with.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in _TYPES or tensor.dtype != dtype:
        return f"they take plain tensors of fp32, bf16 or fp16; got {type(tensor).__name__} of {tensor.dtype}"
    if (kernels := _kernels()) is None:
        return "Triton is not installed"
    if tensor.device.type != "cuda":
        return (
            None if _interpreted(kernels) and tensor.device.type == "cpu" else f"they need a GPU; got {tensor.device}"
        )
    return None if torch.cuda.get_device_capability(tensor.device) >= (8, 0) else "they need a GPU from Ampere on"


def _interpreted(kernels: Any) -> bool:
    return type(kernels.times).__name__ == "InterpretedFunction"


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


class Tile(NamedTuple):
    """rows, columns: of what a program makes. inner: of what it reads at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


def tile_of(rows: int, experts: int, dtype: torch.dtype) -> Tile:
    """By the mean rows of an expert, for Hopper: the least that fills the tensor cores without computing much of
    nothing. What they take of shared memory was read from binaries made for it; their speed has been measured nowhere.
    """
    mean = rows // max(experts, 1)
    if dtype == torch.float32:  # in full precision, which has no tensor cores
        return Tile(16 if mean <= 16 else 64, 64, 32, 4, 2)
    if mean <= 16:
        return Tile(16, 128, 64, 4, 4)
    return Tile(64, 128, 64, 4, 3) if mean <= 64 else Tile(128, 128, 64, 8, 3)


def outer_tile_of(dtype: torch.dtype) -> Tile:
    """Of `outer`, which makes as many rows as columns of a weight, and reads so many of x at a time."""
    return Tile(64, 64, 32, 4, 3) if dtype == torch.float32 else Tile(128, 128, 64, 8, 3)


class Share(NamedTuple):
    """Whose rows are whose. end_A: where each expert's end, int32. rows: how many there could be."""

    end_A: Tensor
    rows: int

    def grid(self, tile: Tile, columns: int) -> tuple[int, int]:
        """-> tiles at most, programs"""
        tiles = self.rows // tile.rows + min(len(self.end_A), self.rows)
        return tiles, tiles * -(-columns // tile.columns)


def _shapes(kernels: Any, share: Share, tile: Tile) -> dict[str, int]:
    return {
        "WIDE": _interpreted(kernels),
        "EXPERTS": max(kernels.triton.next_power_of_2(len(share.end_A)), 16),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "GROUP": _GROUP,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # the default, but Triton 3.9 warns where it is not said
    }


def times(x: Rows, weight: Tensor, bias: Tensor | None, share: Share, out: Tensor | None) -> Tensor:
    """weight: [A, columns, inner], with any strides. -> out_m = weight_e x_m + bias_e"""
    kernels: Any = _kernels()
    source_XD, (experts, columns, inner) = x.source_XD.contiguous(), weight.shape
    out = source_XD.new_empty(share.rows, columns) if out is None else out
    tile = tile_of(share.rows, experts, source_XD.dtype)
    tiles, programs = share.grid(tile, columns)
    if programs:
        with _on(source_XD):
            kernels.times[(programs,)](
                source_XD, x.index_M, weight, bias, share.end_A, out, experts, tiles, columns, inner, *weight.stride(),
                INDEXED=x.index_M is not None, BIASED=bias is not None, **_shapes(kernels, share, tile),
            )  # fmt: skip
    return out


def gated(x: Rows, stack: Stack, share: Share, h_MF: Tensor | None) -> Tensor:
    """h_MF: where what enters the activation is kept, if it is. -> silu(gate) up"""
    kernels: Any = _kernels()
    source_XD, (experts, _, hidden) = x.source_XD.contiguous(), stack.down.shape
    a_MF = source_XD.new_empty(share.rows, hidden)
    tile = tile_of(share.rows, experts, source_XD.dtype)
    tiles, programs = share.grid(tile, hidden)
    if programs:
        with _on(source_XD):
            kernels.gated[(programs,)](
                source_XD, x.index_M, stack.up, stack.up_bias, share.end_A, h_MF, a_MF, experts, tiles, hidden,
                stack.up.shape[2], *stack.up.stride(), INDEXED=x.index_M is not None,
                BIASED=stack.up_bias is not None, KEEP=h_MF is not None, **_shapes(kernels, share, tile),
            )  # fmt: skip
    return a_MF


class Pulled(NamedTuple):
    """a_MF: times the weight of the choice, if there is one. dot_M: <s_m, a_m>, without it; None without weights."""

    dh_MF: Tensor
    a_MF: Tensor
    dot_M: Tensor | None


def gated_back(g: Rows, stack: Stack, share: Share, h_MF: Tensor, weight_M: Tensor | None) -> Pulled:
    """From the gradient of the results to that of h, through down and the activation."""
    kernels: Any = _kernels()
    source_XD, (experts, dim, hidden) = g.source_XD.contiguous(), stack.down.shape
    dh_MF, a_MF = torch.empty_like(h_MF), h_MF.new_empty(share.rows, hidden)
    tile = tile_of(share.rows, experts, source_XD.dtype)
    tile = tile._replace(
        columns=min(tile.columns, 64)
    )  # of 128 what goes into the activation's derivative would not fit the registers
    tiles, programs = share.grid(tile, hidden)
    # Rows that nobody has are not written: sums over them must stay numbers for whoever masks them later.
    dot_BM = None if weight_M is None else weight_M.new_zeros(-(-hidden // tile.columns), share.rows)
    if programs:
        strides = stack.down.stride()
        with _on(source_XD):
            kernels.gated_back[(programs,)](
                source_XD, g.index_M, stack.down, share.end_A, h_MF, weight_M, dh_MF, a_MF, dot_BM, experts, tiles,
                hidden, dim, share.rows, strides[0], strides[2], strides[1], INDEXED=g.index_M is not None,
                SCALED=weight_M is not None, **_shapes(kernels, share, tile),
            )  # fmt: skip
    return Pulled(dh_MF, a_MF, None if dot_BM is None else dot_BM.sum(dim=0))


def outer(left: Rows, right: Rows, share: Share, out: Tensor) -> Tensor:
    """out_e = sum over m of e of left_m right_m^T"""
    kernels: Any = _kernels()
    lefts_XL, rights_XR = left.source_XD.contiguous(), right.source_XD.contiguous()
    experts, lefts, rights = out.shape
    tile = outer_tile_of(out.dtype)
    blocks = -(-lefts // tile.rows) * -(-rights // tile.columns)
    if experts:
        with _on(out):
            kernels.outer[(blocks, experts)](
                lefts_XL, left.index_M, rights_XR, right.index_M, share.end_A, out, lefts, rights,
                LEFT=left.index_M is not None, RIGHT=right.index_M is not None, ROWS=tile.inner, LEFTS=tile.rows,
                RIGHTS=tile.columns, WIDE=_interpreted(kernels), num_warps=tile.num_warps,
                num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def permute(row_XD: Tensor, index_M: Tensor) -> Tensor:
    """-> row_XD[index_m]; zeros where the index is negative"""
    kernels: Any = _kernels()
    row_XD, width = row_XD.contiguous(), row_XD.shape[1]
    out_MD = row_XD.new_empty(len(index_M), width)
    if out_MD.numel():
        with _on(row_XD):
            kernels.permute[(len(index_M), -(-width // _WIDTH))](
                row_XD, index_M.contiguous(), out_MD, width, WIDTH=_WIDTH, enable_fp_fusion=True
            )
    return out_MD


def combine(row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """An Add, to which a negative place is no row."""
    kernels: Any = _kernels()
    row_XD, width, (tokens, top_k) = row_XD.contiguous(), row_XD.shape[1], place_TK.shape
    y_TD = row_XD.new_empty(tokens, width)
    if y_TD.numel():
        with _on(row_XD):
            kernels.combine[(tokens, -(-width // _WIDTH))](
                row_XD, place_TK.contiguous(), None if weight_TK is None else weight_TK.contiguous(), y_TD, width,
                TOP_K=top_k, WEIGHTED=weight_TK is not None, WIDTH=_WIDTH, enable_fp_fusion=True,
            )  # fmt: skip
    return y_TD


def combine_back(dy_TD: Tensor, row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradients of the rows and of the weights. No row has two places."""
    kernels: Any = _kernels()
    row_XD, width, (tokens, top_k) = row_XD.contiguous(), row_XD.shape[1], place_TK.shape
    drow_XD, dweight_TK = torch.zeros_like(row_XD), torch.zeros_like(weight_TK, memory_format=torch.contiguous_format)
    if tokens and row_XD.numel():
        with _on(row_XD):
            kernels.combine_back[(tokens,)](
                dy_TD.contiguous(), row_XD, place_TK.contiguous(), weight_TK.contiguous(), drow_XD, dweight_TK, width,
                TOP_K=top_k, CHOICES=kernels.triton.next_power_of_2(top_k), WIDTH=_WIDTH // 2, enable_fp_fusion=True,
            )  # fmt: skip
    return drow_XD, dweight_TK
