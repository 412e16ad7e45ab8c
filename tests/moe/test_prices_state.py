"""Prices and half-counted steps live through checkpoints, copies, casts and another balancer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe import MoE, settle_prices
from routing import (
    Balancer,
    Bip,
    Cutoff,
    LossFree,
    Quantile,
    Sparsify,
)
from tests.moe.priced import (
    BALANCERS,
    CONFIG,
    TOKENS,
    E,
    Net,
    batch,
    prices,
    statistics,
)


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
