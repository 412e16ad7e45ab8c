"""Padding is neither computed nor counted, and no token that is not padding can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from moe import World, settle_prices
from moe.comm import Peers, world_group
from moe.integrations.huggingface import leave_padding_out, parallelize_experts
from routing import LeastLoaded, LossFree
from tests.moe.integrations.tiny import checkpointed, host_name, layers_of, make, prompt
from tests.world import relative

Worlds = Callable[[int], World]
EXPERTS_A_TOKEN = 2
# group-limited top-k before the choice; a top-k over logits; a choice that is no top-k; a model with its own buffers
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "ernie4_5_moe"]


def batch(rank: int, side: str) -> tuple[Tensor, Tensor]:
    """(tokens, mask): three sequences of 7, 4 and 2 tokens, padded to 7 on one side"""
    x, mask = prompt(rank, batch=3), torch.zeros(3, 7, dtype=torch.int64)
    for row, length in enumerate((7, 4, 2)):
        mask[row, slice(7 - length, 7) if side == "left" else slice(0, length)] = 1
    return x.where(mask.bool(), 0), mask


def loss_of(model: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(x, attention_mask=mask, use_cache=False).logits[mask.bool()]
    return logits, logits.logsumexp(-1).sum()


def errors(family: str, side: str, kind: str) -> tuple[float, list[int]]:
    """-> the largest relative error of a logit or a gradient; rows this rank sent, by layer"""
    peers = Peers.of(world_group())
    whole, model = make(family), make(family)
    parallelize_experts(model, world_group(), assigner=LeastLoaded(headroom=1.0))
    leave_padding_out(model)
    if kind != "none":
        checkpointed(model, use_reentrant=kind == "reentrant")
        model.eval() if family == "phimoe" else None
    sent: list[int] = []
    for layer in layers_of(model):
        layer.observe(lambda choice, assignment: sent.append(int(choice.load_E.sum())))
    logits, loss = loss_of(model, *batch(peers.rank, side))
    loss.backward()
    alone = [loss_of(whole, *batch(rank, side)) for rank in range(peers.size)]
    sum(loss for _, loss in alone).backward()  # type: ignore[union-attr]
    worst = relative(logits, alone[peers.rank][0])
    wanted = dict(whole.named_parameters())
    for name, layer in model.named_modules():
        if layer in layers_of(model):
            for leaf, weight in layer.experts.named_parameters():
                stack = wanted[host_name(f"{name}.experts.{leaf}")].grad
                assert weight.grad is not None
                worst = max(worst, relative(weight.grad, stack[list(layer.experts.expert_ids)]))
    return worst, sent


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_cannot_tell_and_padding_is_not_sent(world: Worlds, family: str) -> None:
    side, kind = ("left", "none") if family != "qwen3_moe" else ("right", "non-reentrant")
    for worst, sent in world(2).run(errors, family, side, kind):
        assert worst < 1e-9
        assert set(sent) == {EXPERTS_A_TOKEN * (7 + 4 + 2)}


def test_prices_and_loads_are_those_of_the_tokens_alone() -> None:
    x, mask = batch(0, "left")
    prices = []
    for padded in (True, False):
        model = make("deepseek_v3").train()
        parallelize_experts(model, balancer=LossFree(step=1e-2))
        if padded:
            leave_padding_out(model)
            model(x, attention_mask=mask, use_cache=False)
        else:
            for row in range(3):
                model(x[row : row + 1, mask[row].bool()], use_cache=False)
        for layer in layers_of(model):
            assert float(layer.router.stat_tokens) == 7 + 4 + 2
        settle_prices(model)
        prices.append(torch.stack([layer.router.price_E for layer in layers_of(model)]))
    assert prices[0].any()
    assert torch.equal(*prices)


def test_generate_with_left_padding_is_token_for_token_the_hosts() -> None:
    x, mask = batch(0, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    wanted = make("mixtral").generate(x, **options)
    model = make("mixtral")
    parallelize_experts(model)
    unhook = leave_padding_out(model)
    sent: list[int] = []
    layers_of(model)[0].observe(lambda choice, assignment: sent.append(int(choice.load_E.sum())))
    assert torch.equal(model.generate(x, **options), wanted)
    assert sent[0] == EXPERTS_A_TOKEN * (7 + 4 + 2), "the prompt without its padding"
    assert set(sent[1:]) == {EXPERTS_A_TOKEN * 3}
    unhook.remove()
    sent.clear()
    model(x, attention_mask=mask)
    assert sent == [EXPERTS_A_TOKEN * 21]


def test_a_model_that_is_not_spread_is_told_so() -> None:
    with pytest.raises(ValueError, match="call parallelize_experts first"):
        leave_padding_out(make("mixtral"))
