"""The compiled top-k is torch's to the bit, equals and NaN included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from routing import DECIDERS, Router, Sigmoid, python_only
from routing.top_k import best_experts

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("compiled")]


@given(
    seed=st.integers(0, 10**6),
    tokens=st.sampled_from([0, 1, 15, 16, 33]),
    experts=st.sampled_from([1, 2, 7, 64, 130, 1200]),
    top_k=st.integers(1, 18),
    values=st.sampled_from([2, 5, 10**9]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_compiled_choice_is_torchs(seed: int, tokens: int, experts: int, top_k: int, values: int) -> None:
    """Of few values most are equal; some are infinite, some are NaN, some rows lie apart in memory."""
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randint(-values, values, (tokens, 2 * experts), generator=generator).float()
    if seed % 3 == 0:
        luck_TE = torch.rand(score_TE.shape, generator=generator)
        score_TE = score_TE.masked_fill(luck_TE < 0.3, -torch.inf).masked_fill(luck_TE > 0.99, torch.nan)
    score_TE, top_k = score_TE[:, :experts] / values, min(top_k, experts)
    price_E = torch.randint(-1, 2, (2 * experts,), generator=generator)[::2] / values
    expected_TK = (score_TE - price_E).topk(top_k, dim=-1).indices
    assert torch.equal(best_experts(score_TE, price_E, top_k), expected_TK)


def test_a_router_chooses_and_learns_alike_on_both_paths() -> None:
    assert DECIDERS.load() is not None
    torch.manual_seed(0)
    router, x_TD = Router(16, 32, 4, score=Sigmoid()), torch.randn(50, 16)
    found = []
    for path in (python_only, torch.enable_grad):
        with path():
            choice = router(x_TD)
            (grad,) = torch.autograd.grad(choice.weight_N.square().sum(), router.weight)
        found.append((choice.expert_N, choice.weight_N, grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_fp32_on_a_cpu_is_compiled_and_the_rest_is_torchs() -> None:
    price_E = torch.randn(20)
    for score_TE in (torch.randn(5, 20).double(), torch.randn(5, 20).bfloat16()):
        assert torch.equal(best_experts(score_TE, price_E, 3), (score_TE - price_E).topk(3, dim=-1).indices)


def test_a_default_device_elsewhere_changes_nothing() -> None:
    score_TE, price_E = torch.randn(5, 20), torch.randn(20)
    want_TK = (score_TE - price_E).topk(3, dim=-1).indices
    with torch.device("meta"):
        assert torch.equal(best_experts(score_TE, price_E, 3), want_TK)


def test_traces_and_transformations_have_no_memory_and_are_torchs() -> None:
    score_TE, price_E = torch.randn(5, 20), torch.randn(20)
    want_TK = (score_TE - price_E).topk(3, dim=-1).indices
    assert torch.equal(torch.vmap(lambda row_TE: best_experts(row_TE, price_E, 3))(score_TE[None])[0], want_TK)
    assert torch.equal(torch.compile(best_experts, backend="eager", fullgraph=True)(score_TE, price_E, 3), want_TK)
    with FakeTensorMode() as mode:
        assert best_experts(mode.from_tensor(score_TE), mode.from_tensor(price_E), 3).shape == (5, 3)
