"""Under activation checkpointing a decision is made once, counted once, and repeated to the row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from moe import Fastest, Grouped, Loop, MoE, MoEConfig, Planned, World
from moe.comm import world_group
from moe.compute import Compute
from routing import Choice, LeastLoaded
from tests.world import KINDS, run


class Unsteady(nn.Module):
    """Two calls of one layer, with a user's own top-k between them. Its input is a little different in every call, as
    if from a kernel that is not deterministic: a router that decided twice would decide differently."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.calls), dtype=x.dtype)
        y = self.layer(x + 0.5 * noise)
        largest = y.topk(2, dim=-1).values.sum()
        return self.layer(y + 0.01 * largest)  # type: ignore[no-any-return]


def build() -> tuple[MoE, list[Choice], list[Choice]]:
    """The layer, the choices its observers heard of, and all that its router made."""
    torch.manual_seed(0)
    settings = MoEConfig(dim=8, hidden=8, num_experts=8, top_k=2, assigner=LeastLoaded(headroom=1.0))
    layer = MoE(settings, world_group(), dtype=torch.float64)
    observed: list[Choice] = []
    made: list[Choice] = []
    layer.observe(lambda choice, assignment: observed.append(choice))
    layer.router.register_forward_hook(lambda module, inputs, choice: made.append(choice))
    return layer, observed, made


def decisions(kind: str, micro_batches: int, backwards: str) -> tuple[list[Any], list[Any], list[int]]:
    layer, observed, made = build()
    model = Unsteady(layer)
    xs = [torch.randn(12, 8, dtype=torch.float64, requires_grad=True) for _ in range(micro_batches)]
    losses = [run(kind, model, x).square().sum() for x in xs]
    if backwards == "together":
        torch.stack(losses).sum().backward()
    else:
        for loss in losses if backwards == "first first" else reversed(losses):
            loss.backward()
    heard = [choice.expert_N.tolist() for choice in observed]
    return heard, [choice.expert_N.tolist() for choice in made], [int(choice.load_E.sum()) for choice in observed]


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backwards", ["first first", "last first", "together"])
def test_a_recomputation_repeats_the_choices_of_its_own_forward(kind: str, backwards: str) -> None:
    heard, made, load = decisions(kind, 3, backwards)
    assert len(heard) == 3 * 2, "counted once a call"
    assert load == [24] * 6
    again = made[6:]
    assert len(again) >= (0 if kind == "none" else 6)
    order = {"first first": [0, 1, 2], "last first": [2, 1, 0], "together": [2, 1, 0]}[backwards]
    want = [choice for batch in order for choice in (heard[2 * batch], heard[2 * batch + 1])]
    if kind != "nested":  # which recomputes more than once
        assert again == want[: len(again)]
    assert all(choice in heard for choice in again)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_recompute_together_without_deciding_again(world: Callable[[int], World], kind: str) -> None:
    for heard, made, load in world(3).run(decisions, kind, 2, "last first"):
        assert len(heard) == 4
        assert load == [24] * 4
        assert all(choice in heard for choice in made)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS[1:])
def test_gradients_under_recomputation_are_those_without(kind: str) -> None:
    """A top-k of the user's own between two layers must not be handed a saved top-k of the router's."""
    grads = []
    for each in ("none", kind):
        layer, _, _ = build()

        def twice(x: Tensor, layer: MoE = layer) -> Tensor:
            y = layer(x)
            return layer(y * y.topk(2, dim=-1).values.sum(dim=-1, keepdim=True))  # type: ignore[no-any-return]

        x = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
        run(each, twice, x).square().sum().backward()  # type: ignore[no-untyped-call]
        grads.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for plain, again in zip(*grads):
        assert torch.equal(plain, again)


def mixed(y: Tensor) -> Tensor:
    """A user's own calls of what a layer calls to decide and to compute."""
    order = torch.arange(len(y)).flip(0)
    y = y.index_select(0, order)[order] + y.sort(stable=True).values
    return torch.cat([y, y.cumsum(0)]).clamp(-2, 2)[: len(y)] * torch.where(y.eq(0), 2.0, 1.0) + y @ y.t() @ y


@pytest.mark.fast
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("saved", ["index_select", "index.Tensor", "mul.Tensor", "eq.Scalar", "sort.stable", "mm", ""])
def test_whatever_selective_checkpointing_saves_comes_back_in_order(saved: str, padded: bool) -> None:
    grads = []
    for contexts in (None, saving(saved)):
        layer, _, _ = build()
        x = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
        valid = torch.arange(12) % 3 > 0 if padded else None

        def twice(x: Tensor, layer: MoE = layer, valid: Tensor | None = valid) -> Tensor:
            return layer(mixed(layer(x, valid)), valid)  # type: ignore[no-any-return]

        y = checkpoint(twice, x, use_reentrant=False, context_fn=contexts) if contexts else twice(x)
        y.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for plain, again in zip(*grads):
        assert torch.equal(plain, again)


def saving(name: str) -> Any:
    """The contexts of a checkpoint that saves what every operation gave whose name has this in it."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if name in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def learnt(kind: type[MoE], settings: MoEConfig, contexts: Any) -> list[Tensor]:
    """The output and all gradients, whose loss is not the same in every token."""
    torch.manual_seed(0)
    group = world_group()
    layer = kind(settings, group)
    generator = torch.Generator().manual_seed(0 if group is None else dist.get_rank(group))
    x = (torch.randn(12, settings.dim, generator=generator) + 1.0).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts) if contexts else layer(x)
    y.square().sum().backward()
    return [y.detach(), *(each.grad for each in (x, *layer.parameters()) if each.grad is not None)]


SAVED = ["mm", "evenmoe", "c10d", "index", ""]  # the last is everything


@pytest.mark.fast
@pytest.mark.parametrize("saved", SAVED, ids=lambda saved: saved or "all")
@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("compute", [Loop(), Grouped(), Fastest()], ids=["loop", "grouped", "fastest"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_whatever_selective_checkpointing_saves_the_experts_are_computed(
    compute: Compute, bias: bool, num_experts: int, saved: str
) -> None:
    """They write where they were told to, and what is saved is not written again."""
    top_k = min(num_experts, 2)
    settings = MoEConfig(dim=8, hidden=16, num_experts=num_experts, top_k=top_k, compute=compute, bias=bias)
    for plain, again in zip(learnt(MoE, settings, None), learnt(MoE, settings, saving(saved)), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", [MoE, Planned], ids=["moe", "planned"])
@pytest.mark.parametrize("saved", SAVED, ids=lambda saved: saved or "all")
def test_whatever_selective_checkpointing_saves_messages_arrive(
    world: Callable[[int], World], kind: type[MoE], saved: str
) -> None:
    assert all(world(2).run(_arrived, kind, saved))


def _arrived(kind: type[MoE], saved: str) -> bool:
    settings = MoEConfig(dim=8, hidden=16, num_experts=4, top_k=2, assigner=LeastLoaded(headroom=1.0, min_chunk=1))
    plain, again = learnt(kind, settings, None), learnt(kind, settings, saving(saved))
    return len(plain) == len(again) and all(torch.equal(one, other) for one, other in zip(plain, again))


@pytest.mark.fast
def test_a_decision_is_forgotten_with_its_graph() -> None:
    import gc
    import weakref

    layer, observed, made = build()
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    y = run("non-reentrant", layer, x)
    kept = weakref.ref(observed[0].expert_N)
    observed.clear()
    made.clear()
    assert kept() is not None
    del y
    gc.collect()
    assert kept() is None


@pytest.mark.fast
def test_a_second_backward_replays_from_the_start() -> None:
    layer, observed, made = build()
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    loss = run("non-reentrant", Unsteady(layer), x).square().sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    assert [choice.expert_N.tolist() for choice in made] == [choice.expert_N.tolist() for choice in observed] * 3
