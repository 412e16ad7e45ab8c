"""Whoever decides leaves its tensors where they are: on a device that has no values, it decides all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from routing import (
    Capacity,
    Cosine,
    ExpertChoice,
    MaskRatio,
    Router,
    Rows,
    Sigmoid,
    SqrtSoftplus,
    Threshold,
    TopK,
    Weigh,
)

pytestmark = pytest.mark.fast
SELECTS = [
    TopK(),
    TopK(groups=4, keep=2, worth="top2sum"),
    Threshold(most=3),
    ExpertChoice(),
    ExpertChoice(within="batch"),
    ExpertChoice(share=MaskRatio(least=1, most=4)),
    ExpertChoice(within="batch", share=MaskRatio(shape="gaussian", least=1, most=4)),
]
OPTIONS: list[dict[str, Any]] = [
    {"score": SqrtSoftplus(), "jitter": 0.1},
    {"score": Cosine(), "drop": Capacity(factor=1.25), "weigh": Weigh(normalize=True, over="wanted")},
    {"score": Sigmoid(), "drop": Capacity(factor=0.5, drop="position"), "weigh": Weigh(normalize=True)},
    {"drop": Capacity(factor=1.0, drop="random")},
]


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("options", OPTIONS, ids=["jitter", "score", "position", "random"])
@pytest.mark.parametrize("select", SELECTS, ids=str)
def test_no_value_is_read_and_no_shape_depends_on_one(select: Any, options: dict[str, Any], padded: bool) -> None:
    """The meta device has shapes alone: reading a value, or a shape that needs one, is an error there."""
    with torch.device("meta"):
        router = Router(8, 8, 2, select=select, **options)
        x_TD = torch.randn(24, 8, requires_grad=True)
        valid_T = torch.ones(24, dtype=torch.bool) if padded else None
        ratio_B = torch.rand(3)
    router.logits = lambda x_TD: router.score.logits(x_TD, router.weight)  # type: ignore[method-assign] # no autocast
    choice = router(x_TD, valid_T, length=8, ratio_B=ratio_B)
    assert {tensor.device.type for tensor in (choice.token_N, choice.expert_N, choice.weight_N)} == {"meta"}
    assert choice.load_E.shape == choice.wanted_E.shape == (8,)
    again = router(x_TD, valid_T, Rows(choice.token_N, choice.expert_N, choice.top_k, choice.wanted_N), length=8)
    again.weight_N.sum().backward()
    assert x_TD.grad is not None
