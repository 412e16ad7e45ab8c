"""A trainer repeats the choices an engine made while it wrote, in another precision and in other batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from moe.integrations.huggingface import parallelize_experts
from routing import Routes, flips, record_routes, replay_routes
from tests.moe.integrations.tiny import FAMILIES, checkpointed, make, prompt

BY_TOP_K = [family for family in FAMILIES if family != "phimoe"]


@pytest.mark.parametrize("family", BY_TOP_K)
def test_a_trainer_takes_the_experts_that_spoke(family: str) -> None:
    trainer = parallelize_experts(make(family))
    engine = copy.deepcopy(trainer).to(torch.bfloat16)
    x = prompt(0, batch=1, length=6)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    with record_routes(engine) as said:  # the prompt at once, then token by token
        written = engine.generate(x, attention_mask=torch.ones_like(x), **options)
    read = written[:, :-1]
    with record_routes(trainer) as alone, torch.no_grad():
        trainer(read)
    checkpointed(trainer, use_reentrant=False)
    with replay_routes(trainer, said.taken), record_routes(trainer) as made:
        trainer(read, labels=read).loss.backward()
    assert flips(said.taken, made.taken).token == 0.0
    assert len(made.again.expert_TLK) == len(made.taken.expert_TLK) == read.numel()
    assert flips(made.taken, alone.taken).token == flips(said.taken, alone.taken).token
    assert all(weight.grad is not None for name, weight in trainer.named_parameters() if "experts.experts" in name)


def test_precision_flips_choices_of_a_model_and_a_replay_removes_them() -> None:
    exact = parallelize_experts(make("qwen3_moe"))
    low = copy.deepcopy(exact).to(torch.bfloat16)
    x = prompt(0, batch=16, length=32)
    with torch.no_grad():
        with record_routes(low) as engine:
            said = low(x).logits.double()
        with record_routes(exact) as alone:
            plain = exact(x).logits
        with replay_routes(exact, engine.taken), record_routes(exact) as made:
            repeated = exact(x).logits
    assert flips(engine.taken, alone.taken).token > 0.005
    assert flips(engine.taken, made.taken).token == 0.0
    flipped = (alone.taken.expert_TLK != engine.taken.expert_TLK).any(axis=(1, 2)).reshape(x.shape)
    far = [(logits - said)[torch.from_numpy(flipped)].norm() for logits in (plain, repeated)]
    assert far[1] < 0.5 * far[0], "where choices flipped, most of the difference was that"


def test_a_sequence_alone_and_in_a_batch_can_be_made_to_choose_alike() -> None:
    model = parallelize_experts(make("qwen3_moe", torch.bfloat16))
    x = prompt(0, batch=16, length=32)
    with torch.no_grad():
        with record_routes(model) as single:
            for row in x:
                model(row[None])
        with replay_routes(model, single.taken), record_routes(model) as together:
            model(x)
    assert flips(single.taken, together.taken).token == 0.0
    assert flips(single.taken, together.wanted).token < 0.2


def test_a_router_that_does_not_ask_for_a_top_k_cannot_be_replayed() -> None:
    model = parallelize_experts(make("phimoe"))
    nothing = Routes(expert_TLK=np.zeros((14, 2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="layer 0 was called for 0 tokens, the routes are of 14"):  # noqa: SIM117
        with replay_routes(model, nothing):
            model(prompt(0))
