"""Activations of an expert, and how a gradient goes back through one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Pull = Callable[[Tensor], Tensor]


class Activation(Protocol):
    """A function of each row alone, without weights of its own: no gradient would reach them."""

    @property
    def fan(self) -> int:
        """How many times as wide as its output its input is."""

    def __call__(self, h_MF: Tensor) -> Tensor: ...


@runtime_checkable
class Linearised(Protocol):
    """An activation that knows its own derivative, because autograd would take more passes over memory."""

    def linearise(self, h_MF: Tensor) -> tuple[Tensor, Pull]:
        """-> its value at h, and da -> dh there"""


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """silu(gate) * up. The first half of the columns is the gate, the second half is up."""

    fan: int = 2

    def __call__(self, h_MF: Tensor) -> Tensor:
        gate_MF, up_MF = h_MF.chunk(2, dim=-1)
        return F.silu(gate_MF) * up_MF

    def linearise(self, h_MF: Tensor) -> tuple[Tensor, Pull]:
        """Both halves of dh are written where they belong; autograd would fill one with zeros and add the other."""
        gate_MF, up_MF = h_MF.chunk(2, dim=-1)
        silu_MF = F.silu(gate_MF)

        def pull(da_MF: Tensor) -> Tensor:
            dh_MF = torch.empty_like(h_MF)
            dgate_MF, dup_MF = dh_MF.chunk(2, dim=-1)
            torch.mul(da_MF, silu_MF, out=dup_MF)
            torch.ops.aten.silu_backward.grad_input(da_MF * up_MF, gate_MF, grad_input=dgate_MF)
            return dh_MF

        return silu_MF * up_MF, pull


@dataclass(frozen=True, kw_only=True)
class GELU:
    fan: int = 1

    def __call__(self, h_MF: Tensor) -> Tensor:
        return F.gelu(h_MF)


@dataclass(frozen=True, kw_only=True)
class ReLU2:
    """relu(h) ** 2"""

    fan: int = 1

    def __call__(self, h_MF: Tensor) -> Tensor:
        return F.relu(h_MF).square()


def linearise(activation: Activation, h_MF: Tensor) -> tuple[Tensor, Pull]:
    """-> a = activation(h), and da -> dh at this h"""
    if isinstance(activation, Linearised):
        return activation.linearise(h_MF)
    with torch.enable_grad():
        leaf_MF = h_MF.detach().requires_grad_()
        a_MF = activation(leaf_MF)
    return a_MF.detach(), lambda da_MF: torch.autograd.grad(a_MF, leaf_MF, da_MF)[0]
