"""FSDP2 around a spread model: it shards all but the experts, whose gradients are averaged as under DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from moe import World, average_expert_grads, expert_parameters
from moe.comm import world_group
from moe.integrations.huggingface import parallelize_experts
from routing import LeastLoaded
from tests.moe.integrations.tiny import checkpointed, host_name, layers_of, make, prompt
from tests.world import relative

Worlds = Callable[[int], World]
RATE, STEPS = 0.05, 2


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(x, labels=x, use_cache=False).loss  # type: ignore[no-any-return]


def sharded(family: str) -> float:
    """Two SGD steps, recomputing, against a model in one piece. -> the largest relative error of a weight"""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole, model = make(family), make(family)
    parallelize_experts(model, world_group(), assigner=LeastLoaded(headroom=1.0))
    checkpointed(model, use_reentrant=False)
    experts = {weight for _, weight in expert_parameters(model)}
    for block in [*model.model.layers, model]:
        fully_shard(block, ignored_params=experts)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=RATE, foreach=False) for each in (model, whole))
    for number in range(STEPS):
        optimizer.zero_grad()
        other.zero_grad()
        loss_of(model, prompt(10 * number + rank)).backward()
        average_expert_grads(model, world_group())
        optimizer.step()
        for every in range(ranks):
            (loss_of(whole, prompt(10 * number + every)) / ranks).backward()
        other.step()
    wanted = dict(whole.named_parameters())
    ids = {id(weight): layer.experts.expert_ids for layer in layers_of(model) for weight in layer.experts.parameters()}
    worst = 0.0
    for name, weight in model.named_parameters():
        mine = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        like = wanted[host_name(name)]
        worst = max(worst, relative(mine, like[list(ids[id(weight)])] if id(weight) in ids else like))
    return worst


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_two_steps_under_fsdp_are_those_of_one_process(world: Worlds, family: str) -> None:
    assert max(world(2).run(sharded, family)) < 1e-9
