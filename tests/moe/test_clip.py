"""The gradient norm of experts on many ranks is that of one process, and clipping by it is the same everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe import MoE, MoEConfig, World, clip_grad_norm, grad_norm
from moe.comm import Peers, sum_over, world_group
from placement import Placement
from routing import LeastLoaded
from tests.world import tokens

Worlds = Callable[[int], World]
COPIES = Placement(expert_RS=np.array([[0, 1, 2], [3, 4, 0], [5, 2, -1]]))


def model(placement: Placement | None) -> nn.Sequential:
    """Two layers on all ranks, one on this rank alone, and a plain one."""
    torch.manual_seed(0)
    settings = MoEConfig(dim=6, hidden=4, num_experts=6, top_k=2, bias=True, assigner=LeastLoaded(headroom=1.0))
    group = world_group()
    layers = [MoE(settings, group, placement), nn.Linear(6, 6), MoE(settings, group, placement)]
    return nn.Sequential(*layers).double()


def norms(copies: bool, norm_type: float, max_norm: float) -> list[float]:
    placement = COPIES if copies and dist.get_world_size() == 3 else None
    net, peers = model(placement), Peers.of(world_group())
    xs = tokens(6, (8, 0, 5), 3.0, torch.float64)
    x = torch.cat(xs) if peers.size == 1 else xs[peers.rank]
    net(x).square().sum().backward()
    experts = {id(p) for layer in net if isinstance(layer, MoE) for p in layer.experts.parameters()}
    sum_over([p.grad for p in net.parameters() if id(p) not in experts and p.grad is not None], peers)
    before = clip_grad_norm(net, max_norm, norm_type).item()
    return [before, grad_norm(net, norm_type).item()]


@pytest.mark.parametrize("copies", [False, True], ids=["", "copies"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_the_norm_counts_each_expert_once(world: Worlds, copies: bool, norm_type: float) -> None:
    alone = world(1).run(norms, copies, norm_type, 0.5)[0]
    assert alone[0] > 0.5
    assert alone[1] == pytest.approx(0.5, rel=1e-5)
    for answer in world(3).run(norms, copies, norm_type, 0.5):
        assert answer == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("norm_type", [2.0, 3.0, float("inf")])
def test_the_norm_is_the_same_to_the_bit_wherever_experts_live(world: Worlds, norm_type: float) -> None:
    norms_of = [world(3).run(_norm_of_fixed_gradients, norm_type, seed) for seed in range(4)]
    assert len({norm for norms in norms_of for norm in norms}) == 1


def _norm_of_fixed_gradients(norm_type: float, seed: int) -> float:
    random = np.random.default_rng(seed)
    expert_RS = np.full((3, 6), -1)
    for slot, rank in enumerate(random.integers(3, size=6)):
        expert_RS[rank, slot] = slot
    config = MoEConfig(dim=6, hidden=4, num_experts=6, top_k=2, bias=True)
    layer = MoE(config, world_group(), Placement(expert_RS=expert_RS))
    for weight in layer.experts.parameters():
        weight.grad = torch.zeros_like(weight)
        for slot, expert in enumerate(layer.experts.expert_ids):
            weight.grad[slot] = torch.randn(weight.shape[1:], generator=torch.Generator().manual_seed(expert))
    return grad_norm(layer, norm_type).item()


@pytest.mark.fast
def test_one_process_has_torchs_own_norm() -> None:
    net = nn.Sequential(MoE(MoEConfig(dim=6, hidden=4, num_experts=6, top_k=2)), nn.Linear(6, 6)).double()
    net(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    mine = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    assert grad_norm(net).item() == pytest.approx(nn.utils.get_total_norm(mine).item(), rel=1e-12)
    assert clip_grad_norm(net, 1e9).item() == grad_norm(net).item(), "a small norm is left alone"


@pytest.mark.fast
def test_a_norm_that_is_no_number_is_an_error_on_request() -> None:
    net = nn.Linear(2, 2)
    net(torch.full((1, 2), float("nan"))).sum().backward()
    with pytest.raises(RuntimeError, match="nan"):
        clip_grad_norm(net, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="norm_type=0"):
        grad_norm(net, 0)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_a_nan_on_one_rank_is_a_nan_on_all(world: Worlds, norm_type: float) -> None:
    assert all(np.isnan(norm) for norm in world(3).run(_norm_with_nan, norm_type))


def _norm_with_nan(norm_type: float) -> float:
    net = model(None)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == 1:
        layer = net[0]
        assert isinstance(layer, MoE)
        assert layer.experts.up.grad is not None
        layer.experts.up.grad[0, 0, 0] = float("nan")
    return grad_norm(net, norm_type).item()


@pytest.mark.fast
def test_half_precision_gradients_neither_overflow_the_norm_nor_vanish() -> None:
    net = nn.Linear(1024, 1024, bias=False).half()
    net.weight.grad = torch.full_like(net.weight, 100.0)
    assert clip_grad_norm(net, 1024.0).item() == pytest.approx(102400.0, rel=1e-6)
    assert net.weight.grad.float().mean().item() == pytest.approx(1.0, rel=1e-3)
