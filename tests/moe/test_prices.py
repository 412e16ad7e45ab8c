"""Statistics count every token once, prices are settled once a step, and both are the same however a step is spread."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe import MoE, MoEConfig, World, leave_experts_alone, reference, settle_after, settle_prices
from moe.comm import world_group
from routing import (
    Balancer,
    Bip,
    Choice,
    Cutoff,
    EdgeQuantile,
    LossFree,
    Quantile,
    Router,
    Sinkhorn,
    Sparsify,
    Unpriced,
)
from tests.moe.test_layer_robust import CountSyncs
from tests.moe.test_recompute import KINDS, run

D, E, K, TOKENS = 6, 8, 2, 64
CONFIG = MoEConfig(dim=D, hidden=4, num_experts=E, top_k=K)
PROPORTIONAL = LossFree(step=0.01, rule="proportional")
BALANCERS = [
    LossFree(step=0.01),
    PROPORTIONAL,
    Bip(),
    Quantile(),
    Quantile(rounds=0),
    EdgeQuantile(),
    Sinkhorn(),
    Cutoff(),
]
SPREADABLE = [LossFree(step=0.01), PROPORTIONAL, Quantile(), Quantile(rounds=0), EdgeQuantile(), Cutoff()]
Worlds = Callable[[int], World]


class Net(nn.Module):
    def __init__(self, balancer: Balancer, group: Any = None, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = replace(CONFIG, balancer=balancer, **more)
        self.first, self.second = (MoE(config, group, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.first(x)
        return y + self.second(y)  # type: ignore[no-any-return]

    @property
    def routers(self) -> list[Router]:
        return [self.first.router, self.second.router]


def batch(tokens: int = TOKENS, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pull = torch.randn(D, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64) + 2 * pull


def prices(model: nn.Module) -> list[list[float]]:
    return [module.price_E.tolist() for module in model.modules() if isinstance(module, Router)]


def statistics(model: nn.Module) -> list[dict[str, Tensor]]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [{name: stat.clone() for name, stat in router.stats.items()} for router in routers]


# ---- counting


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_counted_once_however_activations_are_recomputed(kind: str) -> None:
    net = Net(Quantile())
    for part in batch().chunk(4):
        run(kind, net, part.clone().requires_grad_()).square().sum().backward()  # type: ignore[no-untyped-call]
    for stats in statistics(net):
        assert stats["tokens"] == TOKENS
        assert stats["load_E"].sum() == stats["kept_E"].sum() == TOKENS * K
        assert stats["margin_EB"].sum(dim=1).tolist() == [TOKENS] * E
        torch.testing.assert_close(stats["score_E"].sum(), torch.tensor(TOKENS, dtype=torch.float64))


@pytest.mark.fast
def test_evaluation_counts_nothing_and_padding_is_no_token() -> None:
    net, valid = Net(Quantile()), torch.arange(TOKENS) % 4 > 0
    net.eval()(batch())
    assert not any(stat.any() for stats in statistics(net) for stat in stats.values())
    net.train()
    net.first(batch().where(valid[:, None], torch.nan), valid)
    stats = net.first.router.stats
    assert stats["tokens"] == valid.sum()
    assert stats["load_E"].sum() == K * valid.sum()
    assert stats["margin_EB"].sum() == E * valid.sum()
    assert stats["score_E"].isfinite().all()


# ---- settling


def skip_with_overflow(fused: bool) -> tuple[Net, list[int]]:
    """Three steps under a GradScaler, the second of which overflows. -> tokens in the statistics after each"""
    net = Net(LossFree(step=0.01)).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    settle_after(optimizer, net)
    left = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(net(batch().float()).square().mean() * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        left.append(int(net.first.router.stats["tokens"]))
    return net, left


@pytest.mark.fast
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_settles_nothing_and_its_statistics_count_in_the_next(fused: bool) -> None:
    net, left = skip_with_overflow(fused)
    assert left == [0, TOKENS, 0]
    assert [router.step for router in net.routers] == [2, 2]
    assert net.first.router.closed["tokens"] == 2 * TOKENS


@pytest.mark.fast
def test_an_optimizer_that_evaluates_its_closure_often_settles_once() -> None:
    net = Net(LossFree(step=0.01))
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1e-2, max_iter=3)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = net(batch()).square().mean()
        loss.backward()
        calls.append(1)
        return float(loss.detach())

    handle = settle_after(optimizer, net)
    optimizer.step(closure)
    assert len(calls) > 1
    assert net.first.router.step == 1
    assert net.first.router.closed["tokens"] == TOKENS * len(calls)
    handle.remove()
    optimizer.step(closure)
    assert net.first.router.step == 1


@pytest.mark.fast
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_a_step_without_tokens_leaves_the_prices(balancer: Balancer) -> None:
    net = Net(balancer)
    net(batch())
    settle_prices(net)
    before = prices(net)
    assert any(map(any, before))
    settle_prices(net)
    net(batch()[:0])
    settle_prices(net)
    assert prices(net) == before
    assert [router.step for router in net.routers] == [3, 3]


@pytest.mark.fast
def test_a_schedule_moves_on_with_every_settled_step() -> None:
    net = Net(Quantile(rounds=0), top_k=Sparsify(stages=((0, 4), (2, 1))))
    seen = []
    net.first.observe(lambda choice, assignment: seen.append(choice.k))
    for _ in range(3):
        net(batch())
        settle_prices(net)
    assert seen == [4, 4, 1]
    resumed = Net(Quantile(rounds=0), top_k=Sparsify(stages=((0, 4), (2, 1))))
    resumed.load_state_dict(net.state_dict())
    assert resumed.first.router.step == 3
    assert resumed.first.router.top_k == 1


# ---- spreading


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


# ---- DistributedDataParallel


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


# ---- state


def mid_accumulation(balancer: Balancer) -> Net:
    net = Net(balancer)
    for _ in range(2):
        net(batch())
        settle_prices(net)
    net(batch(seed=7))
    return net


def same_state(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        if "router" in name and "weight" not in name:
            found = other.get_buffer(name)
            assert found.dtype == value.dtype, name
            assert torch.equal(found, value), name


def saved(net: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.fast
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
@pytest.mark.parametrize("assign", [False, True])
def test_a_step_goes_on_from_a_checkpoint_to_the_bit(balancer: Balancer, assign: bool) -> None:
    net, resumed = mid_accumulation(balancer), Net(balancer)
    resumed.load_state_dict(saved(net), assign=assign)
    same_state(net, resumed)
    for model in (net, resumed):
        model(batch(seed=8))
        settle_prices(model)
    same_state(net, resumed)
    assert resumed.first.router.step == 3


@pytest.mark.fast
def test_copies_and_whole_files_carry_an_open_step() -> None:
    net, file = mid_accumulation(Quantile()), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        same_state(net, other)
        other(batch(seed=8))
        settle_prices(other)
        assert other.first.router.step == 3
    assert net.first.router.step == 2
    net(batch(seed=8))
    settle_prices(net)
    same_state(net, other)


@pytest.mark.fast
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_another_balancer_takes_the_prices_and_not_half_of_the_statistics(balancer: Balancer) -> None:
    """Tokens whose scores it did not see would count in its quantiles."""
    for source in (LossFree(), Bip(), Quantile(), Quantile(bins=16), Cutoff()):
        net, other = mid_accumulation(source), Net(balancer)
        other.load_state_dict(saved(net))
        assert prices(other) == prices(net)
        assert other.first.router.step == 2
        kept = {name: stat.shape for name, stat in net.first.router.stats.items()}
        wanted = {name: stat.shape for name, stat in other.first.router.stats.items()}
        left = other.first.router.stats["tokens"]
        assert left == (TOKENS if kept == wanted else 0)
        if kept != wanted:
            assert not any(stat.any() for stats in statistics(other) for stat in stats.values())


@pytest.mark.fast
def test_a_checkpoint_without_an_open_step_starts_one() -> None:
    net, other = mid_accumulation(LossFree()), mid_accumulation(Quantile())
    weights = {name: value for name, value in saved(net).items() if "stat_" not in name}
    other.load_state_dict(weights)
    assert prices(other) == prices(net)
    assert not any(stat.any() for stats in statistics(other) for stat in stats.values())


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "meta": lambda module: module.to("meta"),
    "meta, bf16": lambda module: module.to("meta", torch.bfloat16),
    "emptied": lambda module: module.to_empty(device="cpu"),
}


@pytest.mark.fast
@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_changes_the_type_of_a_price_or_a_statistic(cast: str) -> None:
    net = mid_accumulation(Quantile())
    types = {name: buffer.dtype for name, buffer in net.named_buffers()}
    assert set(types.values()) == {torch.float32, torch.float64, torch.int64}
    before = copy.deepcopy(net)
    CASTS[cast](net)
    assert {name: buffer.dtype for name, buffer in net.named_buffers()} == types
    if "meta" in cast:
        assert {buffer.device.type for buffer in net.buffers()} == {"meta"}
        net.load_state_dict(saved(before), assign=True)
        assert {name: buffer.dtype for name, buffer in net.named_buffers()} == types
    if "emptied" not in cast:
        same_state(before, net)


@pytest.mark.fast
def test_a_narrow_checkpoint_does_not_narrow_the_prices() -> None:
    net, other = mid_accumulation(Quantile()), Net(Quantile())
    narrow = {n: v.bfloat16() if v.is_floating_point() else v for n, v in saved(net).items()}
    other.load_state_dict(narrow, assign=True)
    assert other.first.router.price_E.dtype == torch.float32
    assert other.first.router.stats["tokens"].dtype == torch.float64
    other.load_state_dict(narrow)
    settle_prices(other)


@pytest.mark.fast
def test_two_thousand_steps_of_a_thousandth_make_two_in_a_bf16_model() -> None:
    layer = MoE(replace(CONFIG, balancer=LossFree(step=1e-3), top_k=1)).bfloat16()
    layer.router.stats["load_E"][0] = 1.0
    for _ in range(2000):
        stats = layer.router.stats
        stats["load_E"][0] = stats["tokens"][...] = 1.0
        settle_prices(layer)
    assert layer.router.price_E.dtype == torch.float32
    torch.testing.assert_close(layer.router.price_E, torch.tensor([2.0] + [-2.0] * (E - 1)), rtol=0, atol=1e-4)


@pytest.mark.fast
def test_a_model_made_for_inference_routes_on_its_schedule() -> None:
    with torch.inference_mode():
        net = Net(Quantile(), top_k=Sparsify(stages=((0, 4), (2, 1))))
        assert net(batch()).isfinite().all()
        assert net.first.router.step == 0


# ---- the layer at prices


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


# ---- the host


@pytest.mark.fast
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_prices_never_make_the_host_wait(balancer: Balancer, padded: bool) -> None:
    """After the first step, which reads how many there were before."""
    router = Router(D, E, Sparsify(stages=((0, 2), (1, 1))), balancer=balancer)
    x, valid = batch().float(), torch.arange(TOKENS) % 3 > 0 if padded else None
    waited: list[str] = []

    def noisy(name: str) -> Callable[..., Any]:
        real = getattr(Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            waited.append(name)
            return real(*args, **kwargs)

        return call

    router.observe(router(x, valid))
    router.settle()
    with pytest.MonkeyPatch.context() as patch, CountSyncs() as counter:
        for way in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, way, noisy(way))
        for _ in range(2):
            choice = router(x, valid)
            choice.weight_N.sum().backward()
            router.observe(choice)
            router.settle()
    assert waited + counter.syncs == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False")
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_prices_never_make_the_host_wait_for_a_gpu(balancer: Balancer, padded: bool) -> None:
    router = Router(D, E, K, balancer=balancer, device="cuda")
    x, valid = batch().float().cuda(), (torch.arange(TOKENS) % 3 > 0).cuda() if padded else None
    router.observe(router(x, valid))
    router.settle()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            choice = router(x, valid)
            router.observe(choice)
            router.settle()
    finally:
        torch.cuda.set_sync_debug_mode("default")
