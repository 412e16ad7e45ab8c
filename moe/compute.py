"""How the rows of many experts are multiplied by their weights: one expert at a time, or a whole stack at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.dispatch import upload
from routing import at_least_fp32


class Stack(NamedTuple):
    """The weights of some experts. up_AHD: [A, fan * hidden, dim]; down_ADF: [A, dim, hidden]; biases may be None."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


class Batch(Protocol):
    """Neighbouring rows that are multiplied by one call. `out` is where the answer should go; None: anywhere."""

    @property
    def rows(self) -> slice: ...

    def times(self, row_MD: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """row_m weight_e^T + bias_e"""

    def times_back(self, drow_MF: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """drow_m weight_e"""

    def dweight(self, drow_MF: Tensor, row_MD: Tensor, out: Tensor) -> Tensor:
        """For each expert: sum over its m of drow_m^T row_m"""

    def dbias(self, drow_MF: Tensor, out: Tensor) -> Tensor:
        """For each expert: sum over its m of drow_m"""

    def bias_of(self, bias: Tensor) -> Tensor:
        """bias_e for each row, or one for all"""


@dataclass(frozen=True)
class _One:
    """The rows of one expert."""

    rows: slice
    expert: int

    def times(self, row_MD: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        turned = weight[self.expert].t()
        if bias is None:
            return torch.mm(row_MD, turned, out=out)
        return torch.addmm(bias[self.expert], row_MD, turned, out=out)

    def times_back(self, drow_MF: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return torch.mm(drow_MF, weight[self.expert], out=out)

    def dweight(self, drow_MF: Tensor, row_MD: Tensor, out: Tensor) -> Tensor:
        torch.mm(drow_MF.t(), row_MD, out=out[self.expert])
        return out

    def dbias(self, drow_MF: Tensor, out: Tensor) -> Tensor:
        torch.sum(drow_MF, 0, out=out[self.expert])
        return out

    def bias_of(self, bias: Tensor) -> Tensor:
        return bias[self.expert]


@dataclass(frozen=True, eq=False)
class _All:
    """The rows of a whole stack. row_A: how many for each expert; end_A: where they end, int32."""

    rows: slice
    row_A: Tensor
    end_A: Tensor

    def times(self, row_MD: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        got_MF = F.grouped_mm(row_MD, weight.transpose(1, 2), offs=self.end_A)
        if bias is not None:
            got_MF += self.bias_of(bias)
        return got_MF if out is None else out.copy_(got_MF)

    def times_back(self, drow_MF: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        got_MD = F.grouped_mm(drow_MF, weight, offs=self.end_A)
        return got_MD if out is None else out.copy_(got_MD)

    def dweight(self, drow_MF: Tensor, row_MD: Tensor, out: Tensor) -> Tensor:
        return F.grouped_mm(drow_MF.t(), row_MD, offs=self.end_A)

    def dbias(self, drow_MF: Tensor, out: Tensor) -> Tensor:
        wide_MF = drow_MF.to(at_least_fp32(drow_MF.dtype))
        return torch.segment_reduce(wide_MF, "sum", lengths=self.row_A, axis=0, unsafe=True).to(out.dtype)

    def bias_of(self, bias: Tensor) -> Tensor:
        return bias.repeat_interleave(self.row_A, dim=0, output_size=self.rows.stop - self.rows.start)


class Compute(Protocol):
    def __call__(self, rows_A: Sequence[int], stack: Stack, start: int) -> Sequence[Batch]:
        """The batches of the rows from `start` on, rows_A of them for each expert of the stack, sorted by expert."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One expert at a time: what lies between its matmuls stays in the cache. Any type; best on CPUs."""

    def __call__(self, rows_A: Sequence[int], stack: Stack, start: int) -> Sequence[Batch]:
        batches = []
        for expert, rows in enumerate(rows_A):
            if rows:
                batches.append(_One(slice(start, start + rows), expert))
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

    def __call__(self, rows_A: Sequence[int], stack: Stack, start: int) -> Sequence[Batch]:
        if not self.takes(stack):
            raise ValueError(
                f"a grouped matmul takes fp32, bf16 or fp16 and widths of a multiple of 16 bytes; got "
                f"{stack.up.dtype}, dim {stack.up.shape[2]}, hidden {stack.down.shape[2]}; use Fastest() or Loop()"
            )
        if not sum(rows_A):
            return []
        row_A = upload([rows_A], stack.up.device)[0]
        return [_All(slice(start, start + sum(rows_A)), row_A, row_A.cumsum(0).to(torch.int32))]


@dataclass(frozen=True, kw_only=True)
class Fastest:
    """On GPUs Grouped where it has a kernel of its own (bf16); on CPUs Grouped below `crossover` rows an expert.

    Measured on a CPU (scripts/bench/RESULTS.md): Grouped takes 0.96 to 0.98 of Loop's time at 1 and 8 rows an expert,
    1.04 to 1.12 at 32, up to 1.4 at 512. A few hundredths at the bottom are not worth a second way: the crossover is 0.
    """

    crossover: int = 0

    def __call__(self, rows_A: Sequence[int], stack: Stack, start: int) -> Sequence[Batch]:
        few = sum(rows_A) < self.crossover * len(rows_A)
        grouped = few if stack.up.device.type == "cpu" else stack.up.dtype == torch.bfloat16
        return (Grouped() if grouped and Grouped().takes(stack) else Loop())(rows_A, stack, start)
