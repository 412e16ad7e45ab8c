"""Batches that are a few matmuls: the rows of one expert, or those of a whole stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.activation import Activation, linearise
from moe.stack import Back, Rows, Stack
from routing import at_least_fp32


class Matmuls(ABC):
    """Forward and backward by the few products that differ. `out` is where an answer should go; None: anywhere."""

    rows: slice

    @abstractmethod
    def times(self, row_MD: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """row_m weight_e^T + bias_e"""

    @abstractmethod
    def times_back(self, drow_MF: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """drow_m weight_e"""

    @abstractmethod
    def dweight(self, drow_MF: Tensor, row_MD: Tensor, out: Tensor) -> Tensor:
        """For each expert: sum over its m of drow_m^T row_m"""

    @abstractmethod
    def dbias(self, drow_MF: Tensor, out: Tensor) -> Tensor:
        """For each expert: sum over its m of drow_m"""

    @abstractmethod
    def bias_of(self, bias: Tensor) -> Tensor:
        """bias_e for each row, or one for all"""

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
        h_MF = self.times(x.pick(self.rows), stack.up, stack.up_bias, h_MF)
        result_MD = self.times(activation(h_MF), stack.down, stack.down_bias, result_MD)
        return h_MF if keep else None, result_MD

    def backward(self, back: Back, stack: Stack, activation: Activation) -> None:
        up, down, up_bias, down_bias = back.grads
        g_MD = back.g.pick(self.rows)
        da_MF = self.times_back(g_MD, stack.down, None)
        a_MF, pull = linearise(activation, back.h_MF[self.rows])
        if back.weight_M is not None:
            weight_M1 = back.weight_M[self.rows, None]
            if back.dweight_M is not None:
                dweight_M = _dot(da_MF, a_MF)
                if stack.down_bias is not None:
                    dweight_M += _dot(g_MD, self.bias_of(stack.down_bias))
                back.dweight_M[self.rows] = dweight_M
            da_MF.mul_(weight_M1)
            if down is not None:
                a_MF = torch.mul(a_MF, weight_M1, out=torch.empty_like(a_MF))
        if down is not None:
            back.grads[1] = self.dweight(g_MD, a_MF, down)
        if down_bias is not None:
            if back.weight_M is not None:
                g_MD = g_MD * back.weight_M[self.rows, None]
            back.grads[3] = self.dbias(g_MD.to(stack.down.dtype), down_bias)
        if up is None and up_bias is None and back.drow_XD is None:
            return
        dh_MF = pull(da_MF)
        if up is not None:
            back.grads[0] = self.dweight(dh_MF, back.x.pick(self.rows), up)
        if up_bias is not None:
            back.grads[2] = self.dbias(dh_MF, up_bias)
        if back.drow_XD is not None:
            self.times_back(dh_MF, stack.up, back.drow_XD[self.rows])


@dataclass(frozen=True)
class One(Matmuls):
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
class All(Matmuls):
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


def _dot(left_MD: Tensor, right_MD: Tensor) -> Tensor:
    """<left_m, right_m>, added in fp32 or better."""
    return (left_MD * right_MD).sum(dim=-1, dtype=at_least_fp32(left_MD.dtype))
