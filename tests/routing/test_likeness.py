"""Likeness: what fp32 copies of everything would give, and none of them is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing import Router, Sigmoid
from routing import likeness as module
from routing.likeness import likeness
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
NARROW = st.sampled_from([torch.bfloat16, torch.float16])


def learned(logit_TE: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The logits, and the gradients of a loss that tells all of them apart."""
    dlogit_TE = torch.linspace(-1, 1, logit_TE.numel()).view_as(logit_TE)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # who calls backward inside it gets the same
        grads = torch.autograd.grad(logit_TE, [leaf for leaf in leaves if leaf.requires_grad], dlogit_TE)
    return [logit_TE.detach(), *grads]


@LAW
@given(
    dtype=NARROW,
    weight=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    tokens=st.sampled_from([0, 1, 63, 64, 130]),
    learns=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_product_of_wide_copies(
    dtype: torch.dtype, weight: torch.dtype, tokens: int, learns: tuple[bool, bool], seed: int
) -> None:
    """In parts of 64 tokens. Gradients have the types of what they are of."""
    torch.manual_seed(seed)
    x_TD = torch.randn(tokens, 40).to(dtype).requires_grad_(learns[0])
    weight_ED = torch.randn(7, 40).to(weight).requires_grad_(learns[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WIDE_AT_A_TIME", 64 * 40)
        got = learned(likeness(x_TD, weight_ED, torch.float32), x_TD, weight_ED)
    want = learned(x_TD.double() @ weight_ED.double().t(), x_TD, weight_ED)
    want[0] = want[0].float()
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-5 if one.dtype == torch.float32 else 1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_router_keeps_no_copy_of_its_tokens(dtype: torch.dtype) -> None:
    """Nothing as large as they are but themselves."""
    router, x_TD = Router(128, 4, 2, score=Sigmoid(), dtype=dtype), torch.randn(64, 128, dtype=dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        router(x_TD)
    large = {saved.untyped_storage().data_ptr() for saved in kept if saved.numel() >= x_TD.numel()}
    assert large == {x_TD.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_func_takes_its_own_steps(dtype: torch.dtype) -> None:
    """Of a narrow router, with a loss that tells all experts apart."""
    router, x_TD = Router(16, 4, 2, score=Sigmoid(), dtype=dtype), torch.randn(9, 16, dtype=dtype)

    def loss(x_TD: Tensor) -> Tensor:
        score_TE: Tensor = router(x_TD).score_TE
        return (score_TE * torch.arange(4)).sum()

    want = torch.autograd.grad(loss(x_TD.requires_grad_()), x_TD)[0]
    x_TD = x_TD.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x_TD), want, rtol=1e-2, atol=1e-3)
    each = torch.vmap(lambda x_TD: router(x_TD).logit_TE)(x_TD[:, None])
    torch.testing.assert_close(each[:, 0], router(x_TD).logit_TE, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x_TD = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    (dx_TD,) = torch.autograd.grad(
        likeness(x_TD, torch.randn(2, 8), torch.float32).square().sum(), x_TD, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx_TD.sum().backward()
