"""A Hugging Face model whose experts are spread, under FSDP2: the gradients of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from moe import World, grad_norm
from moe.integrations.fsdp import in_order, shard
from moe.integrations.fsdp import parallelize_experts as as_shards
from moe.integrations.huggingface import parallelize_experts
from routing import LeastLoaded
from tests.moe.integrations.sharded import full, meshes
from tests.moe.integrations.tiny import host_name, make, prompt

RANKS = 4


def spread(family: str) -> tuple[dict[str, Tensor], float]:
    everybody, sparse = meshes(2)
    model = make(family)
    parallelize_experts(model, sparse["ep"], placement=in_order(6, 2), assigner=LeastLoaded(headroom=1.0))
    as_shards(model, sparse["ep"])
    for block in model.model.layers:
        shard(block, mesh=everybody, expert_mesh=sparse["efsdp"])
    fully_shard(model, mesh=everybody)
    x = prompt(dist.get_rank())
    model(x, labels=x).loss.backward()
    grads = {host_name(name): full(weight.grad) for name, weight in model.named_parameters()}
    return grads, grad_norm(model).item()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_hugging_face_model_under_fsdp2_has_the_gradients_of_one_process(
    world: Callable[[int], World], family: str
) -> None:
    model = make(family)
    for rank in range(RANKS):
        x = prompt(rank)
        (model(x, labels=x).loss / RANKS).backward()
    for grads, norm in world(RANKS).run(spread, family):
        assert norm == pytest.approx(grad_norm(model).item(), rel=1e-6)
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            error = (grads[name] - weight.grad).abs().max() / weight.grad.abs().max()
            assert error < 1e-6, f"{name}: {error:.3g}"
