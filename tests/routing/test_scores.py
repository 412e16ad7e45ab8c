"""Scores: in fp32 or better whatever the logits' type, and what their formulas say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from routing import Cosine, Router, Score, Sigmoid, Softmax, SqrtSoftplus, at_least_fp32

pytestmark = pytest.mark.fast

SCORES = pytest.mark.parametrize("score", [Softmax(), Sigmoid(), SqrtSoftplus(), Cosine()])
BOUNDED = pytest.mark.parametrize("score", [Softmax(), Sigmoid()])


def logits(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(13, 9, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_types_become_fp32_and_wider_types_stay(given: torch.dtype, kept: torch.dtype) -> None:
    assert at_least_fp32(given) == kept


@SCORES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_are_in_fp32_or_better(score: Score, dtype: torch.dtype) -> None:
    assert score(logits(dtype)).dtype == at_least_fp32(dtype)


@SCORES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_logits_are_those_of_the_same_fp32_numbers_to_the_bit(score: Score, dtype: torch.dtype) -> None:
    """Nothing was rounded to the half type on the way."""
    half = logits(dtype)
    assert torch.equal(score(half), score(half.float()))
    assert not torch.equal(score(half), score(half).to(dtype).float())


@SCORES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_stay_fp32_under_autocast(score: Score, dtype: torch.dtype) -> None:
    half = logits(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = score(half)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, score(half))


@SCORES
def test_the_gradient_returns_in_the_logits_type(score: Score) -> None:
    half = logits(torch.bfloat16).requires_grad_()
    score(half).square().sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.any()


def test_softmax_is_a_share_of_the_exponentials() -> None:
    given = logits(torch.float64)
    for logit_E, score_E in zip(given.tolist(), Softmax()(given).tolist()):
        total = math.fsum(math.exp(logit) for logit in logit_E)
        np.testing.assert_allclose(score_E, [math.exp(logit) / total for logit in logit_E], rtol=1e-12)


def test_sigmoid_scores_each_expert_alone() -> None:
    given = logits(torch.float64)
    for logit_E, score_E in zip(given.tolist(), Sigmoid()(given).tolist()):
        np.testing.assert_allclose(score_E, [1 / (1 + math.exp(-logit)) for logit in logit_E], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_softmax_scores_of_a_token_sum_to_one(dtype: torch.dtype) -> None:
    total_T = Softmax()(logits(dtype)).sum(dim=-1)
    torch.testing.assert_close(total_T, torch.ones_like(total_T), rtol=1e-6, atol=0.0)


@BOUNDED
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_largest_logits_do_not_overflow(score: Score, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    scores = score(torch.tensor([[most, -most, 0.0]], dtype=dtype))
    assert scores[0, :2].tolist() == [1.0, 0.0]
    assert torch.isfinite(scores).all()


@SCORES
def test_no_tokens_have_no_scores(score: Score) -> None:
    assert score(torch.zeros(0, 5, dtype=torch.bfloat16)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sqrt_softplus_and_its_slope_are_their_formulas_however_small(dtype: torch.dtype) -> None:
    """softplus alone is 0 below -104 in fp32, and the root of 0 has an infinite slope."""
    near = [-170.0, -105.0, -88.0, -40.5, -39.5, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 50.0, 700.0]
    given = torch.tensor([near], dtype=dtype, requires_grad=True)
    score_TE = SqrtSoftplus()(given)
    score_TE.sum().backward()
    assert given.grad is not None
    for logit, score, slope in zip(near, score_TE[0].tolist(), given.grad[0].tolist()):
        softplus = max(logit, 0) + math.log1p(math.exp(-abs(logit)))
        slope_is = math.exp(logit) / (1 + math.exp(logit)) / (2 * math.sqrt(softplus))
        rtol = 1e-6 if dtype == torch.float32 else 1e-12
        np.testing.assert_allclose(score, math.sqrt(softplus), rtol=rtol)
        np.testing.assert_allclose(slope, slope_is, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sqrt_softplus_of_the_largest_logits_is_a_number_with_a_slope(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    given = torch.tensor([[most, -most, 0.0]], dtype=dtype, requires_grad=True)
    score_TE = SqrtSoftplus()(given)
    score_TE.sum().backward()
    assert given.grad is not None
    assert torch.isfinite(score_TE).all()
    assert torch.isfinite(given.grad).all()
    assert score_TE[0, 1] == 0
    torch.testing.assert_close(score_TE[0, 0], torch.tensor(most).sqrt())


def cosine_router(dtype: torch.dtype = torch.float64) -> tuple[Router, torch.Tensor]:
    torch.manual_seed(0)
    return Router(8, 6, 2, score=Cosine(temperature=0.1), dtype=dtype), torch.randn(20, 8, dtype=dtype)


def test_cosine_scores_are_the_softmax_of_cosines_over_the_temperature() -> None:
    layer, x_TD = cosine_router()
    choice = layer(x_TD)
    cosine_TE = torch.nn.functional.cosine_similarity(x_TD[:, None], layer.weight[None], dim=-1)
    torch.testing.assert_close(choice.logit_TE, cosine_TE / 0.1)
    torch.testing.assert_close(choice.score_TE, (cosine_TE / 0.1).softmax(dim=-1))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_lengths_have_no_part_in_a_cosine(scale: float) -> None:
    """Squares of such entries overflow in fp32, or vanish."""
    layer, x_TD = cosine_router(torch.float32)
    before = layer(x_TD).logit_TE.detach()
    x = (x_TD * scale).requires_grad_()
    choice = layer(x)
    torch.testing.assert_close(choice.logit_TE, before, rtol=1e-4, atol=1e-5)
    choice.weight_N.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_zeros_have_a_cosine_of_0_with_everything_and_no_gradient() -> None:
    layer, x_TD = cosine_router()
    with torch.no_grad():
        layer.weight[2] = 0
        x_TD[3] = 0
    x_TD.requires_grad_()
    choice = layer(x_TD)
    choice.score_TE.square().sum().backward()
    assert (choice.logit_TE[3] == 0).all()
    assert (choice.logit_TE[:, 2] == 0).all()
    assert x_TD.grad is not None
    assert layer.weight.grad is not None
    assert not x_TD.grad[3].any()
    assert not layer.weight.grad[2].any()
    assert torch.isfinite(x_TD.grad).all()
    assert torch.isfinite(layer.weight.grad).all()
    assert x_TD.grad.any()


def test_the_gradient_of_a_cosine_is_that_of_its_formula() -> None:
    layer, x_TD = cosine_router()
    weight, x = layer.weight.detach().clone().requires_grad_(), x_TD.clone().requires_grad_()
    assert torch.autograd.gradcheck(Cosine().logits, (x, weight))  # type: ignore[no-untyped-call]


def test_no_number_stays_no_number() -> None:
    """So that a layer sees it."""
    layer, x_TD = cosine_router()
    for bad in (float("nan"), float("inf")):
        assert layer(x_TD.index_fill(0, torch.tensor(4), bad)).logit_TE[4].isnan().all()


@pytest.mark.parametrize("temperature", [0.0, -0.07, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        Cosine(temperature=temperature)
