"""Every way of computing experts is the literal one; unused weights stay out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import GELU, Experts, Fastest, Grouped, Loop, ReLU2, SwiGLU
from moe.guests import Here, Nobody, Stacks
from moe.stack import Stack
from moe.trip import Stay

pytestmark = pytest.mark.fast


def literal(experts: Experts, row_MD: Tensor, rows_A: list[int]) -> Tensor:
    outs, start = [], 0
    for slot, rows in enumerate(rows_A):
        for row in row_MD[start : start + rows]:
            up_bias = None if experts.up_bias is None else experts.up_bias[slot]
            down_bias = None if experts.down_bias is None else experts.down_bias[slot]
            h = experts.activation(F.linear(row, experts.up[slot], up_bias))
            outs.append(F.linear(h, experts.down[slot], down_bias))
        start += rows
    return torch.stack(outs) if outs else row_MD.clone()


@pytest.mark.parametrize("activation", [SwiGLU(), GELU(), ReLU2()], ids=["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("compute", [Loop(), Grouped(), Fastest(), Fastest(crossover=0)], ids=str)
@given(rows_A=st.lists(st.integers(0, 6), min_size=1, max_size=4), bias=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_every_compute_equals_the_literal_loop(compute: Any, activation: Any, rows_A: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    experts = Experts(8, 8, range(len(rows_A)), activation=activation, bias=bias, compute=compute)
    row = torch.randn(sum(rows_A), 8)
    grads = []
    for run in (
        lambda x: experts(x, None, Stay(rows_A=tuple(rows_A)), experts.stack(), Nobody()),
        lambda x: literal(experts, x, rows_A),
    ):
        experts.zero_grad(set_to_none=False)
        x = row.clone().requires_grad_()
        out = run(x)
        (out * torch.linspace(-1, 1, 8)).sum().backward()
        weights = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in experts.parameters()]
        grads.append([out.detach(), x.grad, *weights])
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_grouped_refuses_what_it_cannot_compute_and_fastest_does_it_another_way() -> None:
    experts = Experts(6, 8, [0], compute=Grouped(), dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64, dim 6, hidden 8"):
        experts(x, None, Stay(rows_A=(3,)), experts.stack(), Nobody())
    experts.compute = Fastest()
    assert experts(x, None, Stay(rows_A=(3,)), experts.stack(), Nobody()).shape == (3, 6)


@dataclass(frozen=True)
class _Visiting:
    """Guests that are here already, and whose gradients nobody wants."""

    stack: Stack
    any: bool = True
    keeps: bool = True

    @property
    def guests(self) -> int:
        return len(self.stack.up)

    def fetch(self, weights: Sequence[Tensor]) -> Stacks:
        return Here([weight for weight in self.stack if weight is not None])

    def give_back(self, grads: Sequence[Tensor]) -> Stacks:
        return Here([])

    def add(self, grad: Tensor, came: Tensor) -> None:
        raise AssertionError


def test_visitors_compute_after_the_experts_at_home() -> None:
    torch.manual_seed(0)
    all_three = Experts(8, 8, [0, 1, 2])
    one = Stack(all_three.up[:1], all_three.down[:1], None, None)
    two = Stack(all_three.up[1:], all_three.down[1:], None, None)
    x = torch.randn(6, 8)
    stay = Stay(rows_A=(1, 2, 3))
    apart, together = (
        all_three(x, None, stay, one, _Visiting(two)),
        all_three(x, None, stay, all_three.stack(), Nobody()),
    )
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize("compute", [Loop(), Grouped()], ids=str)
def test_nan_in_an_expert_without_rows_stays_there(compute: Any) -> None:
    experts = Experts(8, 8, [0, 1], compute=compute)
    with torch.no_grad():
        experts.up[1] = float("nan")
    x = torch.randn(4, 8, requires_grad=True)
    out = experts(x, None, Stay(rows_A=(4, 0)), experts.stack(), Nobody())
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert experts.up.grad is not None
    assert torch.equal(experts.up.grad[1], torch.zeros(16, 8))


def test_an_experts_weights_depend_on_its_id_and_the_seed() -> None:
    def weights(*ids: int, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return Experts(8, 8, ids).up.detach()

    assert torch.equal(weights(0, 1, 2)[1:], weights(1, 2))
    assert torch.equal(weights(5)[0], weights(0, 5)[1])
    assert not torch.equal(weights(0)[0], weights(1)[0])
    assert not torch.equal(weights(0), weights(0, seed=1))
    bound = 8**-0.5
    assert weights(*range(50)).abs().max() <= bound
    assert weights(*range(50)).std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
