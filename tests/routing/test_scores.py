"""Scores: in fp32 or better whatever the logits' type, and what their formulas say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from routing import Score, Sigmoid, Softmax, at_least_fp32

pytestmark = pytest.mark.fast

SCORES = pytest.mark.parametrize("score", [Softmax(), Sigmoid()])


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


@SCORES
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_largest_logits_do_not_overflow(score: Score, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    scores = score(torch.tensor([[most, -most, 0.0]], dtype=dtype))
    assert scores[0, :2].tolist() == [1.0, 0.0]
    assert torch.isfinite(scores).all()


@SCORES
def test_no_tokens_have_no_scores(score: Score) -> None:
    assert score(torch.zeros(0, 5, dtype=torch.bfloat16)).shape == (0, 5)
