"""Memory asked for in big pages is memory like any other."""

from __future__ import annotations

import pytest
import torch

from moe.pages import fresh, fresh_like

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("rows", [0, 1, 1023, 4097, 3 * 2**18 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_shape_type_and_strides_asked_for_and_can_be_written(rows: int, dtype: torch.dtype) -> None:
    like = torch.empty(2, 3, dtype=dtype)
    made = fresh(like, rows, 5)
    assert (made.shape, made.dtype) == ((rows, 5), dtype)
    turned = fresh_like(made.t())
    assert (turned.shape, turned.stride(), turned.dtype) == ((5, rows), made.t().stride(), dtype)
    for tensor in (made, turned):
        assert torch.equal(tensor.fill_(3), torch.full_like(tensor, 3))


def test_a_tensor_without_memory_is_left_alone() -> None:
    assert fresh(torch.empty(1, device="meta"), 2**23).device.type == "meta"
