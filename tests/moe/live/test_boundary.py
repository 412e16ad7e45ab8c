"""Between two steps of training: what one rank cannot do, none begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import SGD

from moe import MoE, MoEConfig, World, WorldError
from moe.boundary import cross
from moe.comm import Peers


def test_a_gradient_left_on_one_rank_is_one_error_on_all(world: Callable[[int], World]) -> None:
    with pytest.raises(WorldError) as caught:
        world(2).run(_left_on_rank_one)
    assert str(caught.value).count("experts of ranks [1] have gradients") == 2


def _left_on_rank_one() -> None:
    model = MoE(MoEConfig(dim=4, hidden=4, num_experts=2, top_k=1), dist.group.WORLD)
    if dist.get_rank() == 1:
        model.experts.up.grad = torch.zeros_like(model.experts.up)
    nothing: Any = None
    cross(nothing, dist.get_rank(), 0, model, SGD(model.parameters()), Peers.of(dist.group.WORLD), nothing)
