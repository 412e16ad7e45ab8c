"""Compiles each kernel for a Hopper GPU, which need not be there; fails where it does not fit its shared memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe import kernels
from moe.launch import outer_tile_of, tile_of

SHARED = 227 << 10  # bytes of a block


def compile_one(name: str, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> Any:
    """With pointers and sizes that are multiples of 16, as the launcher finds them for usual widths."""
    kernel = getattr(kernels, name)
    known = {"index": "*i64", "left_index": "*i64", "right_index": "*i64", "place": "*i64", "end_A": "*i32"}
    known |= dict.fromkeys(("scale", "dot", "weight" if name.startswith("combine") else "dweight", "dweight"), "*fp32")
    pointers = ("source", "weight", "bias", "h", "dh", "out", "left", "right", "row", "drow", "dout")
    known = dict.fromkeys(pointers, f"*{dtype}") | known
    constants = constants | ({"stride_k": 1} if "stride_k" in kernel.arg_names else {})
    signature = {arg: "constexpr" if arg in constants else known.get(arg, "i32") for arg in kernel.arg_names}
    odd = {"experts", "tiles", "rows", *constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg not in odd}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", 90, 32), options)


def main() -> None:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for mean in (8, 32, 1024) if name == "bf16" else (1024,):
            tile = tile_of(mean * 128, 128, dtype)
            shapes = {"EXPERTS": 128, "ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner, "GROUP": 8}
            shapes |= {"INDEXED": True, "WIDE": False}
            made = [
                compile_one("times", name, shapes | {"BIASED": True}, tile.num_warps, tile.num_stages),
                compile_one("gated", name, shapes | {"BIASED": False, "KEEP": True}, tile.num_warps, tile.num_stages),
                compile_one(
                    "gated_back", name, shapes | {"COLUMNS": 64, "SCALED": True}, tile.num_warps, tile.num_stages
                ),
            ]
            for binary in made:
                assert binary.metadata.shared <= SHARED, binary.metadata
                assert ("wgmma" in binary.asm["ptx"]) == (name == "bf16" and tile.rows >= 64), "no tensor cores"
        tile = outer_tile_of(dtype)
        shapes = {"LEFT": False, "RIGHT": True, "WIDE": False}
        shapes |= {"ROWS": tile.inner, "LEFTS": tile.rows, "RIGHTS": tile.columns}
        compile_one("outer", name, shapes, tile.num_warps, tile.num_stages)
        compile_one("permute", name, {"WIDTH": 1024}, 4, 3)
        compile_one("combine", name, {"TOP_K": 8, "WEIGHTED": True, "WIDTH": 1024}, 4, 3)
        compile_one("combine_back", name, {"TOP_K": 8, "CHOICES": 8, "WIDTH": 512}, 4, 3)


if __name__ == "__main__":
    main()
