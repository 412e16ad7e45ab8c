"""The harness passes layers that are exact and finds what people's layers get wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import MoE, MoEConfig, assert_ep_parity
from moe.comm import Group, Peers
from moe.parity import CASES
from routing import LeastLoaded

SETTINGS = MoEConfig(dim=6, hidden=4, num_experts=8, top_k=2, bias=True, assigner=LeastLoaded(headroom=1.0))
CASE_OF = {case.name: case for case in CASES}


def make_layer(group: Group) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), MoE(SETTINGS, group), nn.Tanh())


def test_our_layer_is_the_same_on_one_rank_and_on_many() -> None:
    """The full list of hard cases, on 3 ranks that do not divide the 8 experts and on 4 that do."""
    assert_ep_parity(make_layer, dim=6, ranks=(3, 4))


class Sharded(nn.Module):
    """Somebody else's layer, dense on purpose: token t goes to expert t % E, whose weight is one row of a shard. Faults
    are planted by name."""

    def __init__(self, group: Group, fault: str) -> None:
        super().__init__()
        self.peers, self.fault = Peers.of(group), fault
        everybody = torch.randn(8, 6)
        first = self.peers.rank * 8 // self.peers.size
        last = (self.peers.rank + 1) * 8 // self.peers.size
        self.scale = nn.Parameter(everybody[first:last])
        self.gain = nn.Parameter(torch.ones(6))

        if fault == "frozen on many ranks":
            self.gain.requires_grad_(self.peers.size == 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.fault == "hangs without tokens" and len(x) == 0:
            return x * self.gain, None
        scale = _Whole.apply(self.scale, self.peers, self.fault)  # type: ignore[no-untyped-call]
        choice = (x.detach().sum(dim=-1) > 0).long() * 3
        y = x * scale[choice] * self.gain
        if self.fault == "wrong output" and self.peers.size > 1:
            y = y * (1 + 1e-6)
        if self.fault == "router gradient lost" and self.peers.size > 1:
            y = x * scale[choice] * self.gain.detach()
        return y, None


class _Whole(torch.autograd.Function):
    """All shards on every rank; the gradient of a shard is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, peers: Peers, fault: str) -> Tensor:
        ctx.peers, ctx.fault = peers, fault
        lengths = [(r + 1) * 8 // peers.size - r * 8 // peers.size for r in range(peers.size)]
        parts = [torch.zeros(max(lengths), 6, dtype=shard.dtype) for _ in lengths]
        dist.all_gather(parts, torch.cat([shard, shard.new_zeros(max(lengths) - len(shard), 6)]), group=peers.group)
        ctx.lengths = lengths
        return torch.cat([part[:length] for part, length in zip(parts, lengths)])

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None, None]:
        dwhole = dwhole.clone()
        if ctx.fault != "no reduction":
            dist.all_reduce(dwhole, group=ctx.peers.group)
        if ctx.fault == "scaled by ranks":
            dwhole *= ctx.peers.size
        return dwhole.split(ctx.lengths)[ctx.peers.rank], None, None


def sharded(fault: str, group: Group) -> nn.Module:
    return Sharded(group, fault)


def norm_of_shards(layer: nn.Module) -> Tensor:
    assert isinstance(layer, Sharded)
    assert layer.scale.grad is not None
    gain = torch.zeros(()) if layer.gain.grad is None else layer.gain.grad
    square = layer.scale.grad.square().sum()
    if layer.fault != "norm of one shard":
        dist.all_reduce(square, group=layer.peers.group)
    return (square + gain.square().sum()).sqrt()


class _Make:
    """A function of one argument that a process can be sent."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __call__(self, group: Group) -> nn.Module:
        return sharded(self.fault, group)


def check(fault: str, ranks: tuple[int, ...] = (3,), **options: Any) -> None:
    cases = [CASE_OF["ragged"], CASE_OF["empty rank"]]
    assert_ep_parity(_Make(fault), dim=6, ranks=ranks, cases=cases, norm=norm_of_shards, **options)


def test_somebody_elses_exact_layer_passes() -> None:
    check("none")


@pytest.mark.parametrize(
    "fault, found",
    [
        ("wrong output", "ragged: output differs by .*; allowed"),
        ("router gradient lost", "ragged: gradient of gain on rank 0 differs"),
        ("no reduction", r"ragged: gradient of scale\[\d:\d\] on rank \d differs"),
        ("scaled by ranks", r"ragged: gradient of scale\[\d:\d\] on rank \d differs"),
        ("frozen on many ranks", r"gradient of gain: rows \[0, 1, 2, 3, 4, 5\] have one on no rank"),
        ("norm of one shard", "ragged: gradient norm on rank 0 differs"),
    ],
)
def test_a_planted_fault_is_found_and_named(fault: str, found: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check(fault)
    assert re.search(found, str(caught.value)), str(caught.value)


def test_a_hang_is_found_within_the_time_out() -> None:
    with pytest.raises(AssertionError, match="empty rank: failed"):
        check("hangs without tokens", timeout=timedelta(seconds=15))


def test_a_layer_that_fails_alone_is_said_to() -> None:
    check_: Callable[..., None] = assert_ep_parity
    with pytest.raises(AssertionError, match="fails on one rank already"):
        check_(make_layer, dim=7, ranks=(2,))
