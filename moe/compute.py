"""Which batches the rows of many experts are computed in: one expert at a time, a whole stack at once, or by blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe.activation import Activation
from moe.blocks import Blocks, blocks_refuse
from moe.dispatch import add_rows, upload
from moe.fused import Tiles
from moe.launch import combine, kernels_refuse
from moe.matmuls import All, One
from moe.stack import Batch, Stack


class Compute(Protocol):
    def __call__(self, rows_A: Sequence[int], stack: Stack, activation: Activation, start: int) -> Sequence[Batch]:
        """The batches of the rows from `start` on, rows_A of them for each expert of the stack, sorted by expert.

        A compute that adds up the results as well has a method `add`, as moe.trip.Add.
        """


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One expert at a time: what lies between its matmuls stays in the cache. Any type; best on CPUs but for Native."""

    def __call__(self, rows_A: Sequence[int], stack: Stack, activation: Activation, start: int) -> Sequence[Batch]:
        batches = []
        for expert, rows in enumerate(rows_A):
            if rows:
                batches.append(One(slice(start, start + rows), expert))
            start += rows
        return batches


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """One grouped matmul for all experts; best on recent GPUs.

    torch's kernel takes fp32, bf16 and fp16, and widths that are a multiple of 16 bytes.
    """

    def takes(self, stack: Stack) -> bool:
        dtype, widths = stack.up.dtype, (stack.up.shape[1], *stack.down.shape[1:])
        return dtype in (torch.float32, torch.bfloat16, torch.float16) and not any(
            width * dtype.itemsize % 16 for width in widths
        )

    def __call__(self, rows_A: Sequence[int], stack: Stack, activation: Activation, start: int) -> Sequence[Batch]:
        if not self.takes(stack):
            raise ValueError(
                f"a grouped matmul takes fp32, bf16 or fp16 and widths of a multiple of 16 bytes; got "
                f"{stack.up.dtype}, dim {stack.up.shape[2]}, hidden {stack.down.shape[2]}; use Fastest() or Loop()"
            )
        if not sum(rows_A):
            return []
        row_A = upload([rows_A], stack.up.device)[0]
        return [All(slice(start, start + sum(rows_A)), row_A, row_A.cumsum(0).to(torch.int32))]


@dataclass(frozen=True, kw_only=True)
class Native:
    """Blocks of rows in C++: see blocks.cpp. On CPUs, SwiGLU without biases, fp32 and bf16, where it has been built."""

    def takes(self, stack: Stack, activation: Activation) -> bool:
        return blocks_refuse(stack, activation) is None

    def __call__(self, rows_A: Sequence[int], stack: Stack, activation: Activation, start: int) -> Sequence[Batch]:
        if (reason := blocks_refuse(stack, activation)) is not None:
            raise ValueError(f"Native() cannot compute this: {reason}; use Fastest() or Loop()")
        return [Blocks(slice(start, start + sum(rows_A)), tuple(rows_A))] if sum(rows_A) else []


@dataclass(frozen=True, kw_only=True)
class Fastest:
    """On GPUs Grouped where it has a kernel of its own (bf16). On CPUs Native where it can; elsewhere Loop, and Grouped
    below `crossover` rows an expert.

    Measured on a CPU (scripts/bench/RESULTS.md): Grouped takes 0.96 to 0.98 of Loop's time at 1 and 8 rows an expert,
    1.04 to 1.12 at 32, up to 1.4 at 512. A few hundredths at the bottom are not worth a third way: the crossover is 0.
    """

    crossover: int = 0

    def __call__(self, rows_A: Sequence[int], stack: Stack, activation: Activation, start: int) -> Sequence[Batch]:
        few = sum(rows_A) < self.crossover * len(rows_A)
        return self._compute(stack, activation, few)(rows_A, stack, activation, start)

    def _compute(self, stack: Stack, activation: Activation, few: bool) -> Compute:
        on_cpu = stack.up.device.type == "cpu"
        if on_cpu and not few and Native().takes(stack, activation):
            return Native()
        grouped = few if on_cpu else stack.up.dtype == torch.bfloat16
        return Grouped() if grouped and Grouped().takes(stack) else Loop()


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Kernels in Triton for the whole stack, with the gather, SwiGLU and the sum over a token's rows in them: see
    kernels.py. On GPUs from Ampere on, fp32, bf16 and fp16, where Triton is installed; elsewhere what Fastest takes.

    Tested in Triton's interpreter and compiled for Hopper, but run on no GPU yet: so Fastest does not take it.
    """

    def takes(self, stack: Stack) -> bool:
        return not any(kernels_refuse(weight, stack.up.dtype) for weight in stack if weight is not None)

    def __call__(self, rows_A: Sequence[int], stack: Stack, activation: Activation, start: int) -> Sequence[Batch]:
        if not self.takes(stack):
            return Fastest()(rows_A, stack, activation, start)
        if not sum(rows_A):
            return []
        row_A = upload([rows_A], stack.up.device)[0]
        return [Tiles(slice(start, start + sum(rows_A)), row_A, row_A.cumsum(0).to(torch.int32))]

    def add(self, row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        taken = kernels_refuse(row_XD, row_XD.dtype) is None
        return (combine if taken else add_rows)(row_XD, place_TK, weight_TK)
