"""Planned: the results of one process, no number read back, no shape that depends on what was routed, nothing lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe import Capacity, CapacityError, Fastest, MoE, MoEConfig, Planned, World, census, settle_prices
from moe.comm import Peers, world_group
from moe.compute import Compute
from moe.planned import _refuse_copies
from placement import Placement, RoundRobin, Topology
from routing import (
    Balancer,
    Bip,
    BreakEven,
    LeastLoaded,
    LeastLoadedOnDevice,
    LossFree,
    Quantile,
    Sinkhorn,
    SwitchLoss,
    flow_on_device,
)
from tests.moe.test_layer_robust import CountSyncs
from tests.routing.batches import LAW, Batch, batches
from tests.world import _gradients, by_the_book, relative, tokens

Worlds = Callable[[int], World]
CONFIG = MoEConfig(dim=6, hidden=8, num_experts=6, top_k=2)
TIGHT = LeastLoadedOnDevice(headroom=1.0)


@pytest.mark.fast
@LAW
@given(batches(copies=False))
def test_the_flow_on_the_device_is_the_assignments(batch: Batch) -> None:
    assignment = LeastLoaded(headroom=1.0)(*batch)
    flow = flow_on_device(torch.from_numpy(assignment.count_RE), torch.from_numpy(assignment.quota_RE))
    assert np.array_equal(flow.numpy(), assignment.flow_RRE())


def planned(
    config: MoEConfig = CONFIG, dtype: torch.dtype = torch.float64, group: Any = None, **more: Any
) -> tuple[Planned, MoE]:
    """The layer, and one process's with the same weights."""
    layers = []
    for kind, where in ((Planned, group), (MoE, None)):
        torch.manual_seed(0)
        layers.append(kind(config, where, **(more if kind is Planned else {}), dtype=torch.float64).to(dtype))
    return layers[0], layers[1]


CASES: dict[str, tuple[MoEConfig, float, dict[str, Any]]] = {
    "hot": (CONFIG, 5.0, {"plan": TIGHT}),
    "even": (CONFIG, 0.0, {"plan": LeastLoadedOnDevice(headroom=1.2, min_chunk=3)}),
    "bias, shared, padding": (replace(CONFIG, bias=True, shared_hidden=4), 5.0, {"plan": TIGHT}),
    "room that suffices": (CONFIG, 5.0, {"plan": TIGHT, "capacity": Capacity(pair=4.0, visits=2)}),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_planned_layer_is_one_process_with_all_experts(world: Worlds, ranks: int) -> None:
    for seen in world(ranks).run(_exact):
        for name, (worst, error, loans) in seen.items():
            assert error < 1e-12, f"{name}: {worst}"
            assert ranks == 1 or name != "hot" or loans, "nothing was lent"


def _exact(compute: Compute = Fastest(), dtype: torch.dtype = torch.float64) -> dict[str, tuple[str, float, int]]:
    peers, seen = Peers.of(world_group()), {}
    for name, (config, skew, more) in CASES.items():
        layer, full = planned(replace(config, compute=compute), dtype, world_group(), **more)
        xs = tokens(6, (12,) * peers.size, skew, dtype)
        valids = [torch.arange(12) % 3 > 0 if "padding" in name else None for _ in xs]
        x, valid = xs[peers.rank].clone().requires_grad_(), valids[peers.rank]
        ws = tokens(6, (12,) * peers.size, 0.0, dtype, seed=9)
        y = layer(x, valid)
        (y * ws[peers.rank]).sum().backward()
        layer.check()
        x_all = torch.cat(xs).requires_grad_()
        y_all = torch.cat([by_the_book(full, x_TD, v) for x_TD, v in zip(x_all.chunk(peers.size), valids)])
        (y_all * torch.cat(ws)).sum().backward()
        mine = slice(12 * peers.rank, 12 * peers.rank + 12)
        assert x.grad is not None
        assert x_all.grad is not None
        pairs = [("y", y.detach(), y_all.detach()[mine]), ("dx", x.grad, x_all.grad[mine])]
        pairs += _gradients(layer, full, peers)
        worst, error = max(((what, relative(got, want)) for what, got, want in pairs), key=lambda pair: pair[1])
        seen[name] = (worst, error, _loans(layer, full, xs))
    return seen


def _loans(layer: Planned, full: MoE, xs: list[Tensor]) -> int:
    count_RE = torch.stack([full.router(x_TD).load_E for x_TD in xs])
    home_E = torch.from_numpy(layer.placement.home_E.copy())
    quota_RE = layer.plan(count_RE, home_E)
    return int(((quota_RE > 0) & (home_E != torch.arange(len(xs))[:, None])).sum())


class Shapes(TorchDispatchMode):
    """The shapes of everything that is made, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.made.append((func.name(), tuple(tensor.shape)))
        return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_host_waits_and_no_shape_tells_what_was_routed(world: Worlds, ranks: int) -> None:
    """After the first call. So the whole step, forward and backward, can be captured as a CUDA graph."""
    assert world(ranks).run(_static) == [([], True)] * ranks


def _static() -> tuple[list[str], bool]:
    config = replace(CONFIG, hidden=8, dim=8, balancer=LossFree(step=1e-3))
    layer, _ = planned(config, torch.float32, world_group(), plan=TIGHT)
    waited: list[str] = []
    made = []

    def noisy(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            waited.append(name)
            return real(*args, **kwargs)

        return call

    ways = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    steps = [tokens(8, (12,) * world_size, skew, torch.float32)[rank].requires_grad_() for skew in (0.0, 0.0, 9.0)]
    layer(steps[0]).sum().backward()
    for x in steps[1:]:
        layer.zero_grad()
        with pytest.MonkeyPatch.context() as patch, CountSyncs() as counter, Shapes() as shapes:
            for way in ways:
                patch.setattr(torch.Tensor, way, noisy(way, getattr(torch.Tensor, way)))
            layer(x).sum().backward()
        waited += counter.syncs
        made.append(shapes.made)
    return waited, made[0] == made[1]


@pytest.mark.parametrize("capacity", [Capacity(pair=0.25), Capacity(visits=0)], ids=["rows", "visits"])
def test_what_does_not_fit_is_nan_everywhere_and_raises_at_the_check(world: Worlds, capacity: Capacity) -> None:
    messages = world(2).run(_overflow, capacity)
    assert messages[0] == messages[1]
    assert "1 steps since the last check did not fit" in messages[0]


def _overflow(capacity: Capacity) -> str:
    layer, _ = planned(group=world_group(), plan=TIGHT, capacity=capacity)
    x = tokens(6, (12, 12), 9.0, torch.float64)[dist.get_rank()].requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isnan().all()
    assert x.grad is not None
    assert x.grad.isnan().all()
    with pytest.raises(CapacityError) as caught:
        layer.check()
    layer.check()
    return str(caught.value)


def test_ranks_with_different_numbers_of_tokens_and_bad_logits_are_told_alike(world: Worlds) -> None:
    messages = world(2).run(_refused)
    assert messages[0] == messages[1]


def _refused() -> list[str]:
    layer, _ = planned(group=world_group())
    rank = dist.get_rank()
    with pytest.raises(ValueError, match=r"equally many tokens on every rank, at least 1; got \[3, 4\]") as uneven:
        layer(torch.randn(3 + rank, 6, dtype=torch.float64))
    x = torch.randn(4, 6, dtype=torch.float64)
    if rank:
        x[2, 1] = math.nan
    layer(x)
    with pytest.raises(CapacityError, match="logits or prices of 1 tokens") as bad:
        layer.check()
    with pytest.raises(ValueError, match="3 tokens; this layer was first called with 4"):
        layer(x[:3])
    return [str(uneven.value), str(bad.value)]


@pytest.mark.fast
@pytest.mark.parametrize("balancer", [Bip(), LossFree(), Quantile(), Sinkhorn()], ids=lambda b: type(b).__name__)
def test_a_step_with_bad_logits_leaves_no_trace_in_the_prices(balancer: Balancer) -> None:
    x, prices = tokens(6, (12,), 1.0, torch.float32)[0], []
    for bad in (False, True):
        layer, _ = planned(replace(CONFIG, balancer=balancer), torch.float32)
        layer(x)
        if bad:
            layer(x.index_fill(0, torch.tensor([3]), math.nan))
            with pytest.raises(CapacityError, match="logits or prices of 1 tokens"):
                layer.check()
        layer(-x)
        settle_prices(layer)
        prices.append(layer.router.price_E)
    assert torch.equal(*prices)


@pytest.mark.fast
def test_a_price_that_is_no_number_is_an_error_and_an_infinite_one_a_price() -> None:
    x, layers = torch.randn(12, 6), [planned(dtype=torch.float32)[0], MoE(CONFIG)]
    for layer in layers:
        layer.router.price_E[2] = math.inf
        assert 2 not in layer.router(x).expert_N
        layer(x)
        layer.router.price_E[2] = math.nan
    layers[0](x)
    with pytest.raises(CapacityError, match="prices of 12 tokens"):
        layers[0].check()
    with pytest.raises(ValueError, match=r"\[12\] tokens on ranks \[0\]; .* router.price_E"):
        layers[1](x)


@pytest.mark.fast
@pytest.mark.parametrize(
    "change, message",
    [
        ({"plan": LeastLoadedOnDevice(worth=BreakEven(rows=3.0))}, "weighs visits"),
        ({"config": replace(CONFIG, losses=(SwitchLoss(coefficient=0.1),))}, "charges no losses"),
    ],
)
def test_what_it_cannot_promise_it_refuses_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Planned(**({"config": CONFIG} | change))


@pytest.mark.fast
def test_whoever_would_be_told_on_the_host_is_refused() -> None:
    layer = Planned(CONFIG)
    with pytest.raises(ValueError, match="never brings to the host"):
        layer.observe(lambda choice, assignment: None)
    with pytest.raises(ValueError, match="the peers of a Planned layer stay"):
        layer.resettle(layer.placement, Peers.of(None))
    with census(layer), pytest.raises(ValueError, match="no part in a census"):
        layer(torch.randn(3, 6))
    with pytest.raises(ValueError, match="one copy of each expert"):
        _refuse_copies(Placement(expert_RS=np.array([[0, 1], [1, 2]])))


@pytest.mark.fast
def test_without_settings_there_is_room_for_whatever_the_plan_can_do() -> None:
    """A rank's rows at most: the bound of the plan where all rows are as uneven as can be."""
    placement = RoundRobin().place(6, Topology.fitting(num_experts=6, ranks=4, ranks_per_node=4))
    for plan in (TIGHT, LeastLoadedOnDevice(headroom=1.3, min_chunk=5)):
        room = Capacity().room(30, plan, placement, 0)
        count_RE = torch.zeros(4, 6, dtype=torch.int64)
        count_RE[:, 0] = 30
        quota_RE = plan(count_RE, torch.from_numpy(placement.home_E.copy()))
        assert int(quota_RE.sum(dim=1).max()) <= room.rows
        assert room.pair == 30
        assert room.visits == 2


@pytest.mark.fast
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_with_torchs_grouped_matmul_it_is_the_ordinary_layer(dtype: torch.dtype, bound: float) -> None:
    layer, full = planned(replace(CONFIG, dim=8), dtype)
    x = torch.randn(10, 8, dtype=dtype)
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    for one, mine in ((layer, got), (full, want)):
        one(mine).float().square().sum().backward()
    assert got.grad is not None
    assert want.grad is not None
    pairs = [(got.grad, want.grad), *((a.grad, b.grad) for a, b in zip(layer.parameters(), full.parameters()))]
    assert max(relative(a.float(), b.float()) for a, b in pairs if a is not None and b is not None) < bound
