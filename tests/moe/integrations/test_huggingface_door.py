"""transformers' expert parallelism and FSDP2, with our way to bring tokens to experts, train as one process does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.23 has the door")

from transformers import AutoModelForCausalLM

from moe import World
from moe.integrations.huggingface import door_layers, register_ep_implementation
from routing import LeastLoaded
from tests.moe.integrations.tiny import checkpointed, make, prompt
from tests.world import relative

Worlds = Callable[[int], World]
RATE, STEPS = 0.05, 2


def step(model: Any, x: Tensor, ranks: int) -> Tensor:
    return model(x, labels=x, use_cache=False).loss / ranks  # type: ignore[no-any-return]


def by_the_door(folder: str, efsdp: int, recompute: bool) -> tuple[float, int, int]:
    """Two SGD steps on this rank's sequences, against a model in one piece on all of them.
    -> the largest relative error of a weight, doors, loans"""
    from transformers.distributed import DistributedConfig

    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})  # not used: the ranks have met already
    name = register_ep_implementation("evenmoe", assigner=LeastLoaded(headroom=1.0))
    config = DistributedConfig(fsdp_size=ranks, ep_size=ranks // efsdp, ep_implementation=name)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", dtype=torch.float32)
    if recompute:
        checkpointed(model, use_reentrant=False)
    loans = 0

    def count(choice: Any, assignment: Any) -> None:
        nonlocal loans
        loans += int((assignment.quota_RE > 0).sum() - (assignment.quota_RE.sum(0) > 0).sum())

    optimizer, other = (torch.optim.SGD(each.parameters(), lr=RATE) for each in (model, whole))
    for number in range(STEPS):
        optimizer.zero_grad()
        other.zero_grad()
        step(model, prompt(10 * number + rank), 1).backward()
        optimizer.step()
        for every in range(ranks):
            step(whole, prompt(10 * number + every), ranks).backward()
        other.step()
        if number == 0:
            for layer in door_layers(model).values():
                layer.observe(count)
    wanted = dict(whole.named_parameters())
    worst = 0.0
    for name, weight in model.named_parameters():
        full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        worst = max(worst, relative(full, wanted[name]))
    return worst, len(door_layers(model)), loans


@pytest.mark.parametrize("family, ranks, efsdp, recompute", [("gpt_oss", 2, 1, True), ("qwen3_moe", 4, 2, False)])
def test_two_steps_by_the_door_are_those_of_one_process(
    world: Worlds, family: str, ranks: int, efsdp: int, recompute: bool, tmp_path: Path
) -> None:
    make(family, torch.float32).save_pretrained(tmp_path)
    for worst, doors, loans in world(ranks).run(by_the_door, str(tmp_path), efsdp, recompute):
        assert worst < 2e-5
        assert doors == 2
        assert loans > 0, "experts visit"
