"""The layer under every selector and every rule of dropping: the literal loop, whatever the ranks and the recompute."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moe import MoE, MoEConfig, World, charge, settle_prices
from moe.comm import world_group
from routing import (
    Capacity,
    Choice,
    Cosine,
    ExpertChoice,
    LeastLoaded,
    MaskRatio,
    Sigmoid,
    Sparsify,
    SqrtSoftplus,
    SwitchLoss,
    Threshold,
    TopK,
    Weigh,
)
from tests.moe.test_layer_exact import exact
from tests.world import KINDS, Seen, against_reference, build, run

Worlds = Callable[[int], World]
CONFIG = MoEConfig(dim=6, hidden=5, num_experts=8, top_k=2, assigner=LeastLoaded(headroom=1.0), shared_hidden=3)
OVER_WANTED = Weigh(normalize=True, over="wanted")
EVERY: dict[str, dict[str, Any]] = {
    "expert choice": {"select": ExpertChoice(), "weigh": Weigh(normalize=True)},
    "expert choice in the batch": {"select": ExpertChoice(within="batch"), "score": Cosine()},
    "expert choice by mask ratio": {"select": ExpertChoice(share=MaskRatio(least=1, most=6))},
    "threshold": {"select": Threshold(most=4), "score": SqrtSoftplus()},
    "capacity by score": {"drop": Capacity(factor=0.75), "weigh": Weigh(normalize=True)},
    "capacity by position": {
        "drop": Capacity(factor=0.75, drop="position"),
        "weigh": Weigh(normalize=True, over="wanted"),
    },
    "capacity by lot": {"drop": Capacity(factor=0.75, drop="random"), "jitter": 0.2},
    "capacity of expert choice": {"select": ExpertChoice(), "drop": Capacity(factor=0.5, drop="random")},
    "capacity of a threshold": {"select": Threshold(most=4), "drop": Capacity(factor=0.75, drop="position")},
}


def all_of_them(recompute: str, padded: bool, tokens_R: tuple[int, ...]) -> list[Seen]:
    return [
        against_reference(replace(CONFIG, **more), tokens_R, recompute=recompute, padded=padded, length=4, skew=3.0)
        for more in EVERY.values()
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_every_selector_and_drop_is_exact_on_any_number_of_ranks(world: Worlds, ranks: int, padded: bool) -> None:
    for answers in zip(*world(ranks).run(all_of_them, "none", padded, (16, 4, 0, 20)[:ranks])):
        exact(answers)


@pytest.mark.parametrize("recompute", KINDS[1:])
def test_every_selector_and_drop_is_exact_when_recomputed(world: Worlds, recompute: str) -> None:
    for answers in zip(*world(2).run(all_of_them, recompute, True, (16, 20))):
        exact(answers)


@pytest.mark.fast
@pytest.mark.parametrize("more", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("recompute", KINDS[1:])
def test_a_recomputation_repeats_rows_drops_and_counts(more: dict[str, Any], recompute: str) -> None:
    """The input is another in every call, so that whoever decides again decides otherwise."""
    torch.manual_seed(0)
    layer = MoE(replace(CONFIG, **more), dtype=torch.float64)
    calls, heard, made = [0], [], []
    layer.observe(lambda choice, assignment: heard.append(told(choice)))
    layer.router.register_forward_hook(lambda module, inputs, choice: made.append(told(choice)))

    def unsteady(x: Tensor) -> Tensor:
        calls[0] += 1
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(calls[0]), dtype=x.dtype)
        return layer(x + 0.5 * noise, ratio=torch.rand(5)).exp()  # type: ignore[no-any-return]

    x = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    run(recompute, unsteady, x).sum().backward()  # type: ignore[no-untyped-call]
    assert len(heard) == 1
    assert len(made) >= 2
    assert all(again == heard[0] for again in made)
    counted_E = layer.router.stats["load_E"]
    assert counted_E.tolist() == [heard[0][2].count(expert) for expert in range(8)]


def told(choice: Choice) -> tuple[list[int], list[int], list[int]]:
    return choice.token_N.tolist(), choice.expert_N.tolist(), choice.wanted_N.tolist()


@pytest.mark.fast
@pytest.mark.parametrize("more", EVERY.values(), ids=EVERY)
def test_every_selector_trains(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = MoE(replace(CONFIG, **more))
    x, goal, ratio = torch.randn(4, 8, 6), torch.randn(4, 8, 6), torch.rand(4)
    assert layer.router.weight.shape == (8, 6)
    losses = trained(layer, x, goal, ratio)
    assert losses[-1] < 0.7 * losses[0]


def trained(layer: MoE, x: Tensor, goal: Tensor, ratio: Tensor | None = None) -> list[float]:
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x, ratio=ratio) - goal).square().mean()
        loss.backward()
        optimizer.step()
        settle_prices(layer)
        losses.append(loss.item())
    return losses


@pytest.mark.fast
def test_a_token_choice_layer_becomes_expert_choice_by_its_selector_alone() -> None:
    """Weights, router and prices load as they are. Where everybody takes everything, nothing has changed at all."""
    x, goal = torch.randn(4, 8, 6, dtype=torch.float64), torch.randn(4, 8, 6, dtype=torch.float64)
    for k in (8, 3):
        config = replace(CONFIG, top_k=k, weigh=Weigh(normalize=True))
        chosen = build(config, None, None, torch.float64)
        before = trained(chosen, x, goal)
        chooses = MoE(replace(config, select=ExpertChoice()), dtype=torch.float64)
        chooses.load_state_dict(chosen.state_dict())
        assert chooses.router.step == 60
        if k == 8:
            torch.testing.assert_close(chooses(x), chosen(x), rtol=1e-12, atol=1e-12)
        after = trained(chooses, x, goal)
        assert after[0] < before[0], "what was learnt is not lost"
        assert after[-1] < after[0]


@pytest.mark.fast
def test_what_was_dropped_is_told_and_counted_apart() -> None:
    layer = MoE(replace(CONFIG, drop=Capacity(factor=0.5), losses=()), dtype=torch.float64)
    heard: list[Choice] = []
    layer.observe(lambda choice, assignment: heard.append(choice))
    layer(torch.randn(40, 6, dtype=torch.float64))
    assert int(heard[0].wanted_E.sum()) == 80
    assert int(heard[0].load_E.sum()) < 80
    assert layer.router.stats["load_E"].tolist() == heard[0].wanted_E.tolist(), "prices answer to what was wanted"


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_brings_the_step_of_a_schedule_back(tmp_path: Path) -> None:
    schedule = Sparsify(stages=((0, 4), (2, 1)))
    old, new = (MoE(replace(CONFIG, top_k=schedule)) for _ in range(2))
    x = torch.randn(10, 6)
    heard: list[int] = []
    new.observe(lambda choice, assignment: heard.append(int(choice.load_E.sum())))
    new(x)
    for _ in range(2):
        settle_prices(old)
    dcp.save(old.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    dcp.load(new.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    new(x)
    assert heard == [40, 10]


def refused(more: dict[str, Any], what: str) -> str:
    """The error on this rank, where only the last rank's input is no good."""
    group = world_group()
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    layer = build(replace(CONFIG, **more), group, None, torch.float64)
    x, ratio = torch.randn(3, 4, 6, dtype=torch.float64), torch.rand(3)
    if last and what == "no number":
        x[1, 2] = float("nan")
    if last and what == "beyond 1":
        ratio[2] = 1.5
    if last and what == "no ratio":
        ratio = None  # type: ignore[assignment]
    if last and what == "shape":
        ratio = torch.rand(3, 4)
    with pytest.raises(ValueError) as error:
        layer(x, ratio=ratio)
    return str(error.value)


BY_RATIO = {"select": ExpertChoice(share=MaskRatio(least=1, most=6))}


@pytest.mark.parametrize(
    ("more", "what", "told_last", "told_others"),
    [
        *[(more, "no number", "NaN or Inf in the router's logits", r"\[1\] tokens") for more in EVERY.values()],
        (BY_RATIO, "no ratio", "rank 1: MaskRatio needs the masked share .*; call the layer with ratio=", "rank 1"),
        (BY_RATIO, "beyond 1", r"ratio must be between 0 and 1; \[1\] sequences on ranks \[1\]", "sequences on ranks"),
        (BY_RATIO, "shape", r"ratio must be floating point and \[3\]; got torch.float32 and \[3, 4\]", "rank 1"),
    ],
)
def test_bad_input_of_one_rank_is_the_same_error_on_all(
    world: Worlds, more: dict[str, Any], what: str, told_last: str, told_others: str
) -> None:
    first, last = world(2).run(refused, more, what)
    assert re.search(told_last, last)
    assert re.search(told_others, first)


def broken() -> tuple[str, str]:
    """The error on this rank, where the last rank's selector fails with something that no selector should."""
    group = world_group()
    layer = build(CONFIG, group, None, torch.float64)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        layer.router.select = _breaks
    with pytest.raises((ValueError, IndexError)) as error:
        layer(torch.randn(3, 4, 6, dtype=torch.float64))
    return type(error.value).__name__, str(error.value)


def _breaks(*_: object) -> Any:
    raise IndexError("it broke")


def test_whatever_a_selector_fails_with_on_one_rank_the_others_stop_too(world: Worlds) -> None:
    assert world(2).run(broken) == [
        ("ValueError", "bad input on rank 1: all ranks stop with it (this is rank 0)"),
        ("IndexError", "it broke"),
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    "select", [TopK(), ExpertChoice(), Threshold(most=4)], ids=lambda select: type(select).__name__
)
def test_balancing_losses_take_any_choice(select: Any) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, select=select, score=Sigmoid(), losses=(SwitchLoss(coefficient=0.1),))
    layer = MoE(config, dtype=torch.float64)
    loss = layer(torch.randn(3, 4, 6, dtype=torch.float64)).square().mean()
    total = charge(layer, loss)
    total.backward()  # type: ignore[no-untyped-call]
    assert total > loss
    assert torch.isfinite(layer.router.weight.grad).all()  # type: ignore[arg-type]
