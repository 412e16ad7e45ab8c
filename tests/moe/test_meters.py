"""What the meters read is what a count by hand finds over all ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe import Meters, MoE, MoEConfig, World, charge, settle_prices
from moe.comm import Peers, gather_objects, world_group
from placement import Placement
from routing import GlobalLoss, LossFree, Quantile, Sigmoid, SwitchLoss, Unpriced

D, E, K = 6, 8, 2
CONFIG = MoEConfig(dim=D, hidden=4, num_experts=E, top_k=K, balancer=LossFree(step=0.01))
Worlds = Callable[[int], World]


def model_of(group: Any = None, *, layers: int = 2, placement: Placement | None = None, **more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    config = replace(CONFIG, **more)
    return nn.Sequential(*(MoE(config, group, placement, dtype=torch.float64) for _ in range(layers)))


def batch(seed: int, tokens: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pull = torch.randn(D, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64) + pull


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_meters_read_what_a_count_by_hand_finds(world: Worlds, ranks: int) -> None:
    readings = world(ranks).run(_by_hand)
    assert all(reading == readings[0] for reading in readings), "every rank reads the same"


def _by_hand() -> list[dict[str, dict[str, float]]]:
    peers = Peers.of(world_group())
    placement = Placement(expert_RS=np.arange(E).reshape(peers.size, -1))
    model = model_of(world_group(), placement=placement)
    meters = Meters(model)
    wanted: dict[str, list[list[int]]] = {"0": [], "1": []}
    for name, layer in model.named_children():
        layer.observe(lambda choice, assignment, name=name: wanted[name].append(choice.wanted_N.tolist()))
    told, vios = [], []
    for step in range(3):
        for rows in wanted.values():
            rows.clear()
        for part in range(2):
            model(batch(100 * step + 10 * peers.rank + part, 20 + 4 * peers.rank))
        with torch.no_grad():
            model.eval()(batch(0))
        model.train()
        for rows in wanted.values():
            rows.pop()
        settle_prices(model)
        told.append(meters.read(step))
        vio_L = []
        for name, layer in model.named_children():
            rows = np.concatenate([row for rank in gather_objects(wanted[name], peers) for row in rank])
            load_E = np.bincount(rows, minlength=E)
            vio_L.append(_compare(told[-1][name], load_E, layer.router.price_E.numpy(), peers.size))
        vios.append(vio_L)
    np.testing.assert_allclose(meters.tally.avg_L.numpy(), np.mean(vios, axis=0))
    np.testing.assert_allclose(meters.tally.sup_L.numpy(), np.max(vios, axis=0))
    np.testing.assert_allclose(float(meters.tally.avg), np.mean(vios))
    np.testing.assert_allclose(float(meters.tally.sup), np.max(np.mean(vios, axis=1)))
    return told


def _compare(reading: dict[str, float], load_E: Any, price_E: Any, ranks: int) -> float:
    share_E = load_E / load_E.sum()
    want = {
        "max_vio": load_E.max() / load_E.mean() - 1,
        "cv": load_E.std() / load_E.mean(),
        "entropy": -(share_E[share_E > 0] * np.log(share_E[share_E > 0])).sum() / np.log(E),
        "gini": np.abs(load_E[:, None] - load_E).mean() / (2 * load_E.mean()),
        "dead": (load_E == 0).sum(),
        "sum_f2": E * (share_E**2).sum(),
        "price_spread": price_E.max() - price_E.min(),
        "saturated": 0.0,
        "drop_share": 0.0,
        "rank_peak": (peak_R := load_E.reshape(ranks, -1).sum(axis=1)).max() / peak_R.mean(),
    }
    for name, value in want.items():
        np.testing.assert_allclose(reading[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    return float(want["max_vio"])


@pytest.mark.fast
def test_the_flat_p_alarm_sounds_while_the_loss_is_content() -> None:
    """Logits a hundredth as large choose the same, and the Switch loss falls to its least."""
    read, charged = [], []
    for scale in (1.0, 0.01):
        model = model_of(layers=1, balancer=CONFIG.balancer, losses=(SwitchLoss(coefficient=1.0),), top_k=1)
        with torch.no_grad():
            model[0].router.weight.mul_(scale)
        x = batch(3, 256)
        charged.append(float(charge(model, model(x).sum() * 0.0).detach()))
        settle_prices(model)
        read.append(Meters(model).read(0)["0"])
    assert read[0]["max_vio"] == read[1]["max_vio"] > 1
    assert [reading["flat"] for reading in read] == [0, 1]
    assert charged[0] > 1.2
    assert 1 < charged[1] < 1.02


@pytest.mark.fast
def test_saturated_prices_sound_the_alarm() -> None:
    model = model_of(layers=1, score=Sigmoid(), balancer=LossFree(step=0.6))
    meters = Meters(model)
    alarms = []
    for step in range(3):
        model(batch(3))
        settle_prices(model)
        alarms.append(meters.read(step)["0"]["saturated"])
    assert alarms[0] == 1, "two experts 1.2 apart"
    model[0].router.price_E.zero_()
    model[0].router.balancer = LossFree(step=0.4)
    model(batch(3))
    settle_prices(model)
    assert meters.read(3)["0"]["saturated"] == 0


@pytest.mark.fast
def test_loss_share_is_the_levies_part_of_the_loss_charged_last() -> None:
    model = model_of(losses=(GlobalLoss(coefficient=0.5),))
    meters = Meters(model)
    for step in range(2):
        for part in range(2):
            own = model(batch(part)).square().mean()
            whole = charge(model, own)
        with torch.no_grad():
            model(batch(9))  # in training mode, and never charged
        settle_prices(model)
        reading = meters.read(step)
        share = reading["0"]["loss_share"] + reading["1"]["loss_share"]
        assert share == pytest.approx(float(((whole - own) / whole).detach()))
    assert "loss_share" not in _settled(model_of())["0"]
    assert "loss_share" not in _settled(model_of(losses=(GlobalLoss(coefficient=0.5),)))["0"], "nothing was charged"


def _settled(model: nn.Module) -> dict[str, dict[str, float]]:
    model(batch(0))
    settle_prices(model)
    return Meters(model).read(0)


@pytest.mark.fast
def test_sinks_are_told_every_so_often_and_the_tally_of_every_step() -> None:
    model, heard = model_of(), []
    meters = Meters(model, [lambda step, told: heard.append((step, set(told)))], every=2)
    for step in range(5):
        model(batch(step))
        settle_prices(model)
        assert bool(meters.read(step)) == (step % 2 == 0)
    assert heard == [(step, {"0", "1", "mean", "p50", "p95", "max"}) for step in (0, 2, 4)]
    assert meters.tally.steps == 5


@pytest.mark.fast
def test_meters_say_what_they_lack() -> None:
    with pytest.raises(ValueError, match="no MoE layer"):
        Meters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="every=0"):
        Meters(model_of(), every=0)
    with pytest.raises(ValueError, match="call settle_prices"):
        Meters(model_of()).read(0)
    wider = nn.Sequential(model_of(layers=1), MoE(replace(CONFIG, num_experts=4)))
    with pytest.raises(ValueError, match=r"\[4, 8\] experts"):
        Meters(wider)


def test_the_dual_gap_tells_good_prices_from_none() -> None:
    """Prices at the optimum of the batch leave nothing; no prices at all, on scores that lean one way, a lot."""
    gaps = {}
    for balancer in (Quantile(rounds=4, polish=16), Unpriced()):
        torch.manual_seed(0)
        layer = MoE(MoEConfig(dim=8, hidden=4, num_experts=8, top_k=2, balancer=balancer))
        meters = Meters(layer, gap_steps=16)
        layer(torch.randn(256, 8) + torch.randn(8))
        settle_prices(layer, None)
        gaps[type(balancer)] = meters.read(0)["moe"]["dual_gap"]
    assert 0 <= gaps[Quantile] < 1e-5
    assert gaps[Unpriced] > 1e-2


def test_without_gap_steps_there_is_no_gap() -> None:
    layer = MoE(MoEConfig(dim=8, hidden=4, num_experts=8, top_k=2))
    meters = Meters(layer)
    layer(torch.randn(16, 8))
    settle_prices(layer, None)
    assert "dual_gap" not in meters.read(0)["moe"]
    with pytest.raises(ValueError, match="gap_steps=-1"):
        Meters(layer, gap_steps=-1)
