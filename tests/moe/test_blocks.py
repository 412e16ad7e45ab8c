"""The compiled experts do what the others do, in blocks, on any number of threads; and say what they do not take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe import GELU, Experts, Fastest, Loop, Native, SwiGLU
from moe.activation import Activation
from moe.blocks import KERNELS, total
from moe.compute import Compute
from moe.guests import Nobody
from moe.stack import Stack
from moe.trip import Stay
from routing import python_only

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("compiled")]


def stack_of(
    dtype: torch.dtype = torch.float32, *, bias: bool = False, activation: Activation = SwiGLU(), experts: int = 3
) -> Stack:
    return Experts(5, 7, range(experts), activation=activation, bias=bias, dtype=dtype).stack()


def stepped(compute: Compute, rows_A: tuple[int, ...], *, threads: int, dtype: torch.dtype) -> list[Tensor]:
    """y, and all gradients, of rows that lie there sorted."""
    torch.manual_seed(0)
    experts = Experts(5, 7, range(len(rows_A)), compute=compute, dtype=dtype)
    x_TD = torch.randn(sum(rows_A), 5, dtype=dtype, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y_TD = experts(x_TD, None, Stay(rows_A=rows_A), experts.stack(), Nobody())
        grads = torch.autograd.grad(y_TD.square().sum(), [x_TD, experts.up, experts.down])
    finally:
        torch.set_num_threads(before)
    return [y_TD, *grads]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows_A", [(2500, 0, 3), (1024, 1025, 1), (0, 0), (1,)], ids=str)
def test_blocks_of_an_expert_are_one_expert(rows_A: tuple[int, ...], threads: int) -> None:
    got = stepped(Native(), rows_A, threads=threads, dtype=torch.float32)
    want = stepped(Loop(), rows_A, threads=1, dtype=torch.float32)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_two_runs_agree_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one, two = (stepped(Native(), (1500, 40, 7), threads=2, dtype=dtype) for _ in range(2))
        assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k, dim", [(1, 1), (3, 1030), (8, 17)])
def test_a_tokens_rows_are_added_in_fp32(dtype: torch.dtype, top_k: int, dim: int) -> None:
    row_XD, place_TK = torch.randn(20, dim).to(dtype), torch.randint(0, 20, (9, top_k))
    for weight_TK in (None, torch.rand(9, top_k)):
        got_TD = total(row_XD, place_TK, weight_TK)
        want_TD = F.embedding_bag(place_TK, row_XD.float(), per_sample_weights=weight_TK, mode="sum")
        assert got_TD is not None
        assert got_TD.dtype == dtype
        torch.testing.assert_close(got_TD, want_TD.to(dtype))


def test_the_activation_keeps_to_torchs_far_out_and_at_nan() -> None:
    """One expert whose matrices are ones: h is x, twice."""
    stack = Stack(torch.ones(1, 2, 1), torch.ones(1, 1, 1), None, None)
    experts = Experts(1, 1, [0], compute=Native())
    x_TD = torch.tensor([-1e4, -100, -88, -87, -20, -1, -1e-6, 0, 1e-6, 1, 20, 87, 100, 1e4, torch.nan])[:, None]
    with torch.no_grad():
        y_TD = experts(x_TD, None, Stay(rows_A=(len(x_TD),)), stack, Nobody())
    torch.testing.assert_close(y_TD, F.silu(x_TD) * x_TD, equal_nan=True, rtol=1e-6, atol=1e-29)


@pytest.mark.parametrize(
    "stack, activation, told",
    [
        (stack_of(torch.float64), SwiGLU(), "float64"),
        (stack_of(bias=True), SwiGLU(), "biases"),
        (stack_of(activation=GELU()), GELU(), "GELU"),
    ],
    ids=["float64", "bias", "GELU"],
)
def test_what_native_does_not_take_it_names_and_fastest_gives_to_others(
    stack: Stack, activation: Activation, told: str
) -> None:
    with pytest.raises(ValueError, match=f"{told}.*use Fastest"):
        Native()((1, 2, 0), stack, activation, 0)
    assert len(Fastest()((1, 2, 0), stack, activation, 0)) == 2


def test_without_a_build_native_says_so_and_fastest_does_without() -> None:
    stack = stack_of()
    assert len(Fastest()((1, 2, 0), stack, SwiGLU(), 0)) == 1
    with python_only():
        assert KERNELS.load() is None
        assert total(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), None) is None
        assert len(Fastest()((1, 2, 0), stack, SwiGLU(), 0)) == 2
        with pytest.raises(ValueError, match="python_only"):
            Native()((1, 2, 0), stack, SwiGLU(), 0)


def test_weights_of_choices_may_lie_anywhere_in_memory() -> None:
    """Every other number of a longer tensor, say."""
    experts = Experts(5, 7, range(2), compute=Native())
    x_TD, weight_N = torch.randn(6, 5, requires_grad=True), torch.rand(12)[::2].requires_grad_()

    def grads(weight_N: Tensor) -> tuple[Tensor, ...]:
        y_TD = experts(x_TD, weight_N, Stay(rows_A=(4, 2)), experts.stack(), Nobody())
        return torch.autograd.grad(y_TD.square().sum(), [x_TD, weight_N, experts.up])

    for strided, packed in zip(grads(weight_N), grads(weight_N.detach().clone().requires_grad_()), strict=True):
        torch.testing.assert_close(strided, packed)
