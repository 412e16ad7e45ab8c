"""Prices are the same however a step is spread over ranks, and the layer computes what was chosen at them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moe import (
    MoE,
    average_expert_grads,
    clip_grad_norm,
    leave_experts_alone,
    reference,
    settle_after,
    settle_prices,
    share_overflow,
)
from moe.comm import world_group
from routing import (
    Balancer,
    Choice,
    LossFree,
    Quantile,
    Unpriced,
)
from tests.moe.priced import (
    BALANCERS,
    CONFIG,
    PROPORTIONAL,
    SPREADABLE,
    TOKENS,
    K,
    Net,
    Worlds,
    batch,
    prices,
)


@pytest.mark.parametrize("balancer", SPREADABLE, ids=repr)
def test_prices_are_the_same_to_the_bit_however_a_step_is_spread(world: Worlds, balancer: Balancer) -> None:
    """Over ranks, with experts on all of them or shared out, and over micro-batches."""
    (want,) = world(1).run(_settled, balancer, 1, True)
    assert any(map(any, want))
    for ranks, micro_batches, shared in ((1, 8, True), (2, 1, True), (4, 2, True), (4, 1, False)):
        for got in world(ranks).run(_settled, balancer, micro_batches, shared):
            assert got == want, (ranks, micro_batches)


def _settled(balancer: Balancer, micro_batches: int, shared: bool) -> list[list[float]]:
    """One layer only: a second one's tokens would depend on the first one's same-batch prices. The tokens' entries and
    the router's weights are small whole numbers, so that no matrix product depends on how many rows it has."""
    torch.manual_seed(0)
    layer = MoE(replace(CONFIG, balancer=balancer), world_group() if shared else None, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.mul_(8).round_().div_(8)
    for step in range(3):
        x = (batch(seed=step) * 8).round() / 8
        for part in x[dist.get_rank() :: dist.get_world_size()].chunk(micro_batches):
            layer(part)
        settle_prices(layer)
    return prices(layer)


@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_all_ranks_settle_on_the_same_prices(world: Worlds, balancer: Balancer) -> None:
    for ranks in (2, 4):
        settled = world(ranks).run(_trained, balancer)
        assert all(prices_R == settled[0] for prices_R in settled)


def _trained(balancer: Balancer) -> list[list[float]]:
    net = Net(balancer, world_group())
    for step in range(3):
        net(batch(seed=10 * dist.get_rank() + step))
        settle_prices(net)
    return prices(net)


def test_all_layers_are_settled_by_one_message(world: Worlds) -> None:
    assert world(2).run(_messages) == [1, 1]


def _messages() -> int:
    net, calls, real = Net(Quantile(), world_group()), [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    net(batch())
    dist.all_reduce = counted
    try:
        settle_prices(net)
    finally:
        dist.all_reduce = real
    return len(calls)


def test_prices_may_be_settled_over_a_part_of_the_ranks(world: Worlds) -> None:
    first, second, third, fourth = world(4).run(_halves)
    assert first == second != third == fourth


def _halves() -> list[list[float]]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = Net(PROPORTIONAL)
    net(batch(seed=dist.get_rank()))
    settle_prices(net, halves[dist.get_rank() // 2])
    return prices(net)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(world: Worlds, fused: bool) -> None:
    """As docs/train.md has it. Without share_overflow the other would step, and wait to settle."""
    (left, scales, outside, _), other = ranks = world(2).run(_overflowing, fused)
    assert other[:3] == (left, scales, outside)
    assert left == [0, TOKENS, 0]
    assert scales == [8.0, 4.0, 4.0]
    for *_, (before, skipped, after) in ranks:
        assert skipped == before != after


def _overflowing(fused: bool) -> Any:
    """Three steps in fp16, and in the second one rank's experts have a gradient that overflows. -> after each, tokens
    in the statistics, the scale; in the end all but the experts; after each, the experts"""
    net = Net(LossFree(step=0.01), world_group()).float()
    outside = DistributedDataParallel(leave_experts_alone(net))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    settle_after(optimizer, net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    left, scales, experts = [], [], []
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = outside(batch(seed=10 * dist.get_rank() + step).float()).float().square().mean()
        scaler.scale(loss).backward()
        average_expert_grads(net, world_group())
        if step == dist.get_rank() == 1:
            net.first.experts.up.grad.view(-1)[0] = torch.inf
        share_overflow(optimizer)
        scaler.unscale_(optimizer)
        clip_grad_norm(net, 1.0)
        scaler.step(optimizer)
        scaler.update()
        left.append(int(net.first.router.stats["tokens"]))
        scales.append(scaler.get_scale())
        experts.append(net.second.experts.up.tolist())
    state = {name: value.tolist() for name, value in net.state_dict().items() if "experts" not in name}
    return left, scales, {name: value for name, value in state.items() if "stat_" not in name}, experts


@pytest.mark.parametrize("how", ["told", "told, sharded", "untold"])
def test_ddp_leaves_each_rank_what_it_has_seen(world: Worlds, how: str) -> None:
    """Its broadcast of buffers, before every forward, would make all ranks tell what the first has seen."""
    for load, want in world(2).run(_under_ddp, how):
        assert load == want
        assert sum(load) == 4 * TOKENS * K


def _under_ddp(how: str) -> tuple[list[float], list[float]]:
    net = Net(LossFree(), world_group() if "sharded" in how else None)
    net.register_buffer("users", torch.full((1,), float(dist.get_rank())))
    seen: list[Tensor] = []
    net.first.observe(lambda choice, assignment: seen.append(choice.load_E) if net.training else None)
    model = DistributedDataParallel(net if how == "untold" else leave_experts_alone(net))
    for step in range(4):  # without no_sync, with evaluation in between
        model(batch(seed=10 * dist.get_rank() + step)).sum().backward()
        with torch.no_grad():
            model.eval()(batch())
        model.train()
    assert net.users == 0, "other buffers are DDP's to broadcast"
    return net.first.router.stats["load_E"].tolist(), torch.stack(seen).sum(dim=0).tolist()


@pytest.mark.fast
def test_buffers_that_the_user_hid_from_ddp_stay_hidden() -> None:
    net = Net(LossFree())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["mine"])  # type: ignore[no-untyped-call]
    leave_experts_alone(net)
    assert "mine" in net._ddp_params_and_buffers_to_ignore


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("balancer", [*BALANCERS, Unpriced()], ids=repr)
def test_under_every_balancer_the_layer_computes_what_was_chosen(world: Worlds, ranks: int, balancer: Balancer) -> None:
    assert max(world(ranks).run(_against_reference, balancer)) < 1e-12


def _against_reference(balancer: Balancer) -> float:
    config = replace(CONFIG, balancer=balancer)
    torch.manual_seed(0)
    layer = MoE(config, world_group(), dtype=torch.float64)
    torch.manual_seed(0)
    state = MoE(config, dtype=torch.float64).expert_state()
    choices: list[Choice] = []
    layer.observe(lambda choice, assignment: choices.append(choice))
    error = 0.0
    for step in range(3):
        x = batch(tokens=16 + dist.get_rank(), seed=10 * dist.get_rank() + step)
        y = layer(x)
        error = max(error, float((y - reference(x, choices[-1], state, config.activation)).abs().max().detach()))
        settle_prices(layer)
    return error
