"""What is unlike between ranks that must be alike: one error on every rank, and none of them waits for another."""

from __future__ import annotations

import gc
import io
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe import Grouped, MoE, MoEConfig, Planned, World, leave_experts_alone
from placement import Placement
from routing import NearestCopy
from tests.world import tokens

Worlds = Callable[[int], World]
COPIES = Placement(expert_RS=[[0, 1, 2], [2, 3, 0]])
WRONG = {
    "autocast": "ranks [1] compute in torch.bfloat16, rank 0 in torch.float32",
    "experts that have copies": "other weights of the experts learn on ranks [1] than on rank 0",
    "experts of Planned": "other weights of the experts learn on ranks [1] than on rank 0",
    "router": "the router, or every weight, is frozen on ranks [1] and not on rank 0",
    "whole numbers": "bad input on rank 1",
    "refused type": "a grouped matmul takes fp32, bf16 or fp16",
}


def layer_of(kind: type[MoE] = MoE, placement: Placement | None = None, **settings: Any) -> MoE:
    torch.manual_seed(0)
    config = MoEConfig(**({"dim": 8, "hidden": 16, "num_experts": 4, "top_k": 1} | settings))
    dtype = torch.float64 if "compute" in settings else torch.float32
    return kind(config, dist.group.WORLD, placement, dtype=dtype)


def my_tokens() -> Tensor:
    return tokens(8, [6] * dist.get_world_size(), 1.0, torch.float32)[dist.get_rank()]


@pytest.mark.parametrize("what", WRONG)
def test_what_is_unlike_on_one_rank_is_an_error_on_all(world: Worlds, what: str) -> None:
    messages = world(2).run(_unlike, what)
    assert all(message.startswith(WRONG[what]) for message in messages), messages


def _unlike(what: str) -> str:
    odd, x = dist.get_rank() == 1, my_tokens()
    if what == "experts of Planned":
        layer = layer_of(Planned)
    elif what == "experts that have copies":
        layer = layer_of(placement=COPIES, assigner=NearestCopy())
    elif what == "refused type":
        layer, x = layer_of(num_experts=1, compute=Grouped()), x.double()
    else:
        layer = layer_of()
    if odd and what.startswith("experts"):
        layer.experts.up.requires_grad_(False)
    if odd and what == "router":
        layer.router.requires_grad_(False)
    if odd and what == "whole numbers":
        x = x.long()
    narrow = what == "whole numbers" or (odd and what == "autocast")
    with pytest.raises(ValueError) as caught, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        layer(x).sum().backward()
    dist.barrier()
    return str(caught.value)


def test_weights_may_be_frozen_on_some_ranks_alone_where_nobody_waits_for_them(world: Worlds) -> None:
    assert world(2).run(_frozen_alone) == [[True, True, True], [True, False, False]]


def test_without_gradients_any_rank_may_have_anything_frozen(world: Worlds) -> None:
    assert world(2).run(_frozen_without_gradients) == [True, True]


@torch.no_grad()
def _frozen_without_gradients() -> bool:
    """Do they give what they gave before?"""
    layers = [layer_of(), layer_of(placement=COPIES, assigner=NearestCopy())]
    before = [layer(my_tokens()) for layer in layers]
    for layer in layers:
        layer.requires_grad_(dist.get_rank() == 1)
    return all(torch.equal(layer(my_tokens()), y) for layer, y in zip(layers, before, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, ValueError])
def test_an_error_that_was_caught_keeps_nothing_in_memory_and_says_where_it_was_made(kind: type[Exception]) -> None:
    """Whoever catches a lack of memory tries again with less. Cycles would stay until they are collected."""

    def fails(*given: object) -> None:
        raise kind("it broke")

    layer, x = MoE(MoEConfig(dim=8, hidden=8, num_experts=4, top_k=2)), torch.randn(3, 8)
    layer.router.select = fails  # type: ignore[assignment]
    batch, text = x * 1, ""
    left = weakref.ref(batch)
    gc.collect()
    gc.disable()
    try:
        try:
            layer(batch)
        except kind:
            text = traceback.format_exc()
        del batch
        assert left() is None
    finally:
        gc.enable()
    assert "in fails" in text


def _frozen_alone() -> list[bool]:
    layer = layer_of()
    if dist.get_rank() == 1:
        layer.experts.requires_grad_(False)
    layer(my_tokens()).sum().backward()  # the router takes every rank along
    return [weight.grad is not None for weight in layer.parameters()]


@pytest.mark.parametrize("told", [False, True])
def test_ddp_that_would_make_experts_equal_is_an_error(world: Worlds, told: bool) -> None:
    assert world(2).run(_under_ddp, told) == ["" if told else "DistributedDataParallel took '1.experts.up'"] * 2


def _under_ddp(told: bool) -> str:
    net = nn.Sequential(nn.Linear(8, 8), layer_of())
    return _start_of_error(DistributedDataParallel(leave_experts_alone(net) if told else net))


def test_ddp_may_average_experts_over_the_ranks_that_hold_the_same(world: Worlds) -> None:
    assert world(4).run(_twins) == [""] * 4


def _twins() -> str:
    rank = dist.get_rank()
    shared, twins = [dist.new_group([0, 1]), dist.new_group([2, 3])], [dist.new_group([0, 2]), dist.new_group([1, 3])]
    config = MoEConfig(dim=8, hidden=16, num_experts=4, top_k=1)
    net = nn.Sequential(nn.Linear(8, 8), MoE(config, shared[rank // 2]))
    return _start_of_error(DistributedDataParallel(net, process_group=twins[rank % 2]))


def _start_of_error(model: nn.Module) -> str:
    try:
        model(my_tokens()).sum().backward()
    except ValueError as error:
        return str(error).split(" for ")[0]
    return ""


def test_a_layer_on_several_ranks_says_how_it_is_saved(world: Worlds) -> None:
    assert all("moe.checkpoint.save" in message for message in world(2).run(_pickled))


def _pickled() -> str:
    with pytest.raises(ValueError) as caught:
        torch.save(layer_of(), io.BytesIO())
    return str(caught.value)
