"""Trainer, and Accelerate under it, train a spread model as one process trains it whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")
pytest.importorskip("accelerate", reason="accelerate is not installed; pip install 'evenmoe[dev]'")

from moe import World, grad_norm, leave_experts_alone
from moe.comm import world_group
from moe.integrations.huggingface import parallelize_experts
from moe.integrations.huggingface.trainer import ExpertGradients
from routing import LeastLoaded
from tests.moe.integrations.tiny import host_name, layers_of, make, prompt
from tests.world import relative

Worlds = Callable[[int], World]
RATE, STEPS, NORM = 0.05, 3, 0.5


def trained(folder: str, max_grad_norm: float = 0.0, accumulate: int = 1) -> dict[str, Any]:
    """Three steps over eight sequences by Trainer, on the ranks there are. -> name -> (experts, weights)"""
    from transformers import Trainer, TrainingArguments

    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})  # not used: the ranks have met already
    model = make("qwen3_moe", torch.float32)
    parallelize_experts(model, world_group(), assigner=LeastLoaded(headroom=1.0))
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=8 // ranks // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=max_grad_norm,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in prompt(0, batch=8)]
    trainer = Trainer(
        leave_experts_alone(model), arguments, train_dataset=data, callbacks=[ExpertGradients(max_norm=NORM)]
    )
    trainer.train()
    assert all(int(layer.router.settled) == STEPS for layer in layers_of(model))
    ids = {name: layer.experts.expert_ids for name, layer in model.named_modules() if layer in layers_of(model)}
    state: dict[str, Any] = {}
    for name, weight in model.named_parameters():
        block = name.partition(".experts.experts.")[0] + ".experts"
        state[host_name(name)] = (ids.get(block) if ".experts.experts." in name else None, weight.detach())
    return state


def whole() -> dict[str, Tensor]:
    """The same three steps, by hand, in this process."""
    model = make("qwen3_moe", torch.float32).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    x = prompt(0, batch=8)
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(x, labels=x).loss.backward()
        assert grad_norm(model) > NORM
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimiser.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_takes_the_steps_of_one_process(world: Worlds, tmp_path: Any, accumulate: int) -> None:
    want, start = whole(), dict(make("qwen3_moe", torch.float32).named_parameters())
    for state in world(2).run(trained, str(tmp_path), 0.0, accumulate):
        assert state.keys() == want.keys()
        for name, (ids, weight) in state.items():
            there = want[name] if ids is None else want[name][list(ids)]
            assert relative(weight, there) < 1e-5, name
            began = start[name].detach() if ids is None else start[name].detach()[list(ids)]
            assert not torch.equal(weight, began) or torch.equal(there, began)


def refused(folder: str) -> str:
    try:
        trained(folder, max_grad_norm=1.0)
    except ValueError as error:
        return str(error)
    return ""


def test_trainer_must_not_clip_by_itself(world: Worlds, tmp_path: Any) -> None:
    assert (
        "use TrainingArguments(max_grad_norm=0) and ExpertGradients(max_norm=1.0)"
        in world(2).run(refused, str(tmp_path))[0]
    )


def refused_fp16() -> str:
    """Trainer itself has fp16 on a GPU alone."""
    arguments = SimpleNamespace(max_grad_norm=0.0, fp16=True)
    try:
        ExpertGradients().on_train_begin(arguments, None, None)
    except ValueError as error:
        return str(error)
    return ""


def test_trainer_must_not_skip_steps_on_one_rank_alone(world: Worlds) -> None:
    assert all("use TrainingArguments(bf16=True)" in told for told in world(2).run(refused_fp16))
    assert refused_fp16() == "", "alone"
