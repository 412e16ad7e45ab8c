"""Compiles the kernel of the decision for a Hopper GPU, which need not be there."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from routing import kernels, launch


def compile_one(experts: int, top_k: int, whole: bool) -> Any:
    """With pointers that are multiples of 16, and rows side by side."""
    wide = triton.next_power_of_2(experts)
    constants = {"PADDED": whole, "WHOLE": whole, "NORMALIZED": whole, "TOP_K": top_k, "stride_e": 1}
    constants |= {"CHOICES": triton.next_power_of_2(top_k), "TOKENS": launch.tokens_at_once(wide), "EXPERTS": wide}
    constants |= {} if whole else {"valid": None, "weight": None, "load": None}
    known = {"score": "*fp32", "price": "*fp32", "valid": "*u8", "expert": "*i64", "weight": "*fp32", "load": "*i64"}
    known |= {"scale": "fp32"}
    names = kernels.decide.arg_names
    signature = {arg: "constexpr" if arg in constants else known.get(arg, "i32") for arg in names}
    odd = {"tokens", "experts", "scale", *constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if arg not in odd}
    options = {"num_warps": launch.WARPS, "enable_fp_fusion": True}
    return triton.compile(ASTSource(kernels.decide, signature, constants, aligned), GPUTarget("cuda", 90, 32), options)


def main() -> None:
    for experts, top_k, whole in (
        (1, 1, True),
        (128, 8, True),
        (256, 8, False),
        (60, 4, True),
        (launch.MOST_EXPERTS, 32, True),
    ):
        binary = compile_one(experts, top_k, whole)
        assert binary.metadata.shared <= 48 << 10, binary.metadata
        assert ("gpu.relaxed.add" in binary.asm["ptx"]) == whole, "only loads are added up"


if __name__ == "__main__":
    main()
