"""MaskRatio: k falls or rises with the masked share of a sequence, as its shape says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routing import Constant, ExpertChoice, MaskRatio, Router, Tokens
from routing.mask_ratio import Shape
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
SHAPES: list[Shape] = ["linear", "linear-reverse", "cosine", "cosine-reverse", "gaussian", "gaussian-reverse"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear-reverse", [32, 26, 20, 8]),
        ("cosine-reverse", [32, 28, 20, 8]),
        ("linear", [8, 14, 20, 32]),
        ("cosine", [8, 12, 20, 32]),
        ("gaussian", [8, 20, 32, 8]),
        ("gaussian-reverse", [32, 20, 8, 32]),
    ],
)
def test_k_at_a_few_ratios_is_the_published_one(shape: Shape, expected: list[int]) -> None:
    ratio_B = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert MaskRatio(shape=shape, least=8, most=32).k(ratio_B).tolist() == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_over_evenly_spread_ratios_is_20(shape: Shape) -> None:
    ratio_B = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    mean = MaskRatio(shape=shape, least=8, most=32, sigma=0.22).k(ratio_B).double().mean().item()
    expected = {"gaussian": 20.03, "gaussian-reverse": 19.97}.get(shape, 20.0)
    assert round(mean, 2) == expected


@LAW
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 40),
    st.integers(0, 40),
    st.floats(0.05, 3.0),
    st.floats(0, 1),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_k_stays_between_least_and_most_and_mirrors_its_reverse(
    shape: Shape, least: int, more: int, sigma: float, ratio: float, dtype: torch.dtype
) -> None:
    one = MaskRatio(shape=shape, least=least, most=least + more, sigma=sigma)
    other: Shape = shape.removesuffix("-reverse") if "-" in shape else f"{shape}-reverse"  # type: ignore[assignment]
    ratio_B = torch.tensor([ratio], dtype=dtype)
    k = int(one.k(ratio_B))
    mirrored = int(MaskRatio(shape=other, least=least, most=least + more, sigma=sigma).k(ratio_B))
    assert least <= k <= least + more
    assert k + mirrored in (2 * least + more - 1, 2 * least + more, 2 * least + more + 1)  # halves may round apart


def test_ratios_that_are_none_count_as_the_nearest_that_is() -> None:
    ratio_B = torch.tensor([-1.0, 2.0, math.inf, -math.inf, math.nan])
    assert MaskRatio(shape="linear", least=1, most=9).k(ratio_B).tolist() == [1, 9, 9, 1, 1]


def test_without_ratios_the_error_says_how_to_give_them() -> None:
    router = Router(4, 8, 4, select=ExpertChoice(share=MaskRatio(least=2, most=6)))
    with pytest.raises(ValueError, match="call the layer with ratio="):
        router(torch.randn(6, 4))


def test_constant_is_the_routers_own_k() -> None:
    assert Constant()(5, Tokens(None, 3)) == Constant().most_k(5) == 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shape": "square"}, "no shape 'square'; use one of linear, linear-reverse, cosine"),
        ({"shape": "linear-"}, "no shape 'linear-'"),
        ({"least": 0}, "least=0 to most=6"),
        ({"least": 7}, "least=7 to most=6"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"sigma": -1.0}, "sigma=-1.0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MaskRatio(**{"shape": "gaussian", "least": 2, "most": 6, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "told"), [(5, 4, "up to 6 of 5 experts"), (8, 1, "takes 2 to 6"), (8, 7, "takes 2 to 6")]
)
def test_a_schedule_that_does_not_fit_the_router_is_refused(num_experts: int, top_k: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Router(4, num_experts, top_k, select=ExpertChoice(share=MaskRatio(least=2, most=6)))
