"""A census knows a step before it is taken; without one, GlobalLoss knows what has passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import MoE, MoEConfig, World, census, settle_prices
from moe.census import Pool
from moe.comm import world_group
from routing import Bip, Choice, GlobalLoss, Loss

D, E = 6, 8
Worlds = Callable[[int], World]


def layer_of(group: Any = None, losses: tuple[Loss, ...] = (GlobalLoss(coefficient=0.1),), **more: Any) -> MoE:
    torch.manual_seed(0)
    settings = {"dim": D, "hidden": 4, "num_experts": E, "top_k": 2, "losses": losses} | more
    return MoE(MoEConfig(**settings), group, dtype=torch.float64)


def batch(seed: int, tokens: int = 12) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def watch(layer: MoE) -> list[Choice]:
    choices: list[Choice] = []
    layer.observe(lambda choice, assignment: choices.append(choice))
    return choices


def pools_of(layer: MoE) -> list[list[int]]:
    """What each forward's losses were told from now on."""
    told: list[list[int]] = []
    layer.levies.register_forward_pre_hook(lambda module, inputs: told.append(inputs[2].tolist()))
    return told


def summed(load_E: Tensor) -> list[int]:
    load_E = load_E.clone()
    dist.all_reduce(load_E)
    return load_E.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_forward_is_told_what_all_ranks_choose_in_all_micro_batches(world: Worlds, ranks: int) -> None:
    for shared in (True, False):
        world(ranks).run(_counted, shared)


def _counted(shared: bool) -> None:
    layer = layer_of(world_group() if shared else None, balancer=Bip(), jitter=0.1)
    told, choices = pools_of(layer), watch(layer)
    for step in range(2):
        told.clear(), choices.clear()
        parts = [batch(100 * step + 10 * dist.get_rank() + part, 8 + 4 * part) for part in range(3)]
        with census(layer):
            for part in parts:
                layer(part)
        assert not told, "a census charges nothing"
        assert not choices, "nor does it observe"
        for part in parts:
            layer(part)
        want = summed(torch.stack([choice.load_E for choice in choices]).sum(dim=0))
        assert told == [want] * 3
        settle_prices(layer)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_without_a_census_a_forward_is_told_what_its_group_has_chosen_so_far(world: Worlds, ranks: int) -> None:
    world(ranks).run(_running)


def _running() -> None:
    layer = layer_of(world_group())
    told, choices = pools_of(layer), watch(layer)
    for step in range(2):
        told.clear(), choices.clear()
        for part in range(3):
            layer(batch(100 * step + 10 * dist.get_rank() + part))
        loads = torch.stack([choice.load_E for choice in choices])
        assert told == [summed(loads[: part + 1].sum(dim=0)) for part in range(3)]
        settle_prices(layer)


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_census_leaves_everything_as_it_was(mode: str) -> None:
    layer, state = layer_of(jitter=0.1), torch.get_rng_state()
    layer.train(mode == "train")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with census(layer):
        y = layer(batch(0))
    assert not y.requires_grad
    assert layer.pool.load_E.sum() == 24, "in evaluation too: it was asked to count"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.training == (mode == "train")


@pytest.mark.fast
def test_a_census_that_fails_leaves_nothing_behind() -> None:
    layer = layer_of()
    told = pools_of(layer)
    with pytest.raises(ValueError, match="the layer takes"):
        _census_of(layer, [batch(0), batch(0)[:, :-1]])
    choices = watch(layer)
    layer(batch(1))
    assert told == [choices[0].load_E.tolist()]
    assert layer.router.stats["tokens"] == 12


def _census_of(layer: MoE, parts: list[Tensor]) -> None:
    with census(layer):
        for part in parts:
            layer(part)


@pytest.mark.fast
def test_each_census_counts_anew() -> None:
    layer = layer_of()
    for _ in range(3):
        _census_of(layer, [batch(0)])
    assert layer.pool.load_E.sum() == 24


@pytest.mark.fast
@pytest.mark.parametrize("how", ["emptied", "assigned"])
def test_a_layer_made_on_no_device_counts_from_nothing(how: str) -> None:
    """Its pool is in no checkpoint, so nobody fills it."""
    source = layer_of()
    layer = layer_of().to("meta")
    if how == "emptied":
        layer.to_empty(device="cpu")
        layer.pool.load_E.fill_(-7)
    layer.load_state_dict(source.state_dict(), assign=how == "assigned")
    told, choices = pools_of(layer), watch(layer)
    layer(batch(0))
    assert told == [choices[0].load_E.tolist()]


@pytest.mark.fast
def test_layers_without_a_pooled_loss_count_only_in_a_census() -> None:
    model = nn.ModuleList([layer_of(), layer_of(losses=())])
    for layer in model:
        layer(batch(0))
    pools = [module for module in model.modules() if isinstance(module, Pool)]
    assert [pool.empty for pool in pools] == [False, True]
    with census(model):
        model[0](batch(0))
    assert [int(pool.load_E.sum()) for pool in pools] == [24, 0]
    model[1](batch(0))
