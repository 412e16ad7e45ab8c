"""A model under FSDP2 with its experts on meshes of their own trains as one process trains it whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from moe import World, clip_grad_norm, grad_norm, settle_prices
from moe.integrations.fsdp import parallelize_experts, shard
from routing import Assigner, AtHome, Balancer, Bip, LossFree
from tests.moe.integrations.sharded import (
    Net,
    batch,
    config,
    full,
    layers_of,
    loss_of,
    sharded,
    whole_state,
)
from tests.world import KINDS, relative, run

Worlds = Callable[[int], World]
RANKS, STEPS, NORM = 4, 3, 0.2
LEAST: Any = config().assigner


class Run(NamedTuple):
    """What three steps did: (outputs of this rank, norm, gradients) of each, and the state in the end."""

    steps: list[tuple[list[Tensor], float, dict[str, Tensor]]]
    state: dict[str, Tensor]
    loans: int


def train(net: Net, micro: int, mine: list[int], dtype: torch.dtype = torch.float32) -> Run:
    """AdamW, clipped, prices settled. mine: the ranks whose batches this process runs; micro: batches of a rank."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loans: list[int] = []
    for layer in layers_of(net):
        layer.observe(lambda choice, assignment, layer=layer: loans.append(len(assignment.loans(layer.placement))))
    steps = []
    for step in range(STEPS):
        optimiser.zero_grad()
        outs, parts = [], [(rank, part) for rank in mine for part in range(micro)]
        for rank, part in parts:
            x = batch(rank, 10 * step + part, dtype).requires_grad_()  # a reentrant checkpoint wants it
            if isinstance(net, FSDPModule):
                net.set_requires_gradient_sync((rank, part) == parts[-1])
            y = net(x)
            ((y - torch.sin(x)).square().mean() / micro / len(mine)).backward()
            outs.append(y.detach())
        norm = clip_grad_norm(net, NORM).item()
        grads = {name: full(weight.grad) for name, weight in net.named_parameters() if weight.grad is not None}
        steps.append((outs, norm, grads))
        optimiser.step()
        settle_prices(net)
    return Run(steps, whole_state(net), sum(loans))


def train_sharded(
    ep: int,
    assigner: Assigner,
    balancer: Balancer,
    dtype: torch.dtype = torch.float64,
    micro: int = 1,
    kind: str = "none",
    options: dict[str, Any] | None = None,
) -> Run:
    net = Net(config(assigner, balancer), dtype)
    net.run = partial(run, kind)
    return train(sharded(net, ep, **(options or {})), micro, [dist.get_rank()], dtype)


def one_process(balancer: Balancer, dtype: torch.dtype = torch.float64, micro: int = 1) -> Run:
    return train(Net(config(AtHome(), balancer), dtype), micro, list(range(RANKS)), dtype)


def alike(runs: list[Run], want: Run, tolerance: float = 1e-10) -> None:
    for rank, got in enumerate(runs):
        for step, (outs, norm, grads) in enumerate(got.steps):
            wanted_outs, wanted_norm, wanted_grads = want.steps[step]
            for part, out in enumerate(outs):
                assert relative(out, wanted_outs[rank * len(outs) + part]) < tolerance, f"output, step {step}"
            assert norm == pytest.approx(wanted_norm, rel=tolerance)
            assert grads.keys() == wanted_grads.keys()
            for name, grad in grads.items():
                error = (grad - wanted_grads[name]).abs().max() / wanted_grads[name].abs().max()
                assert error < tolerance, f"gradient of {name}, step {step}: {error:.3g}"
        assert got.state.keys() == want.state.keys()
        for name, value in got.state.items():
            assert relative(value, want.state[name]) < tolerance, name


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("assigner", [AtHome(), LEAST], ids=["home", "least"])
@pytest.mark.parametrize("balancer", [LossFree(step=0.1), Bip(rounds=4)], ids=["loss-free", "bip"])
def test_three_steps_are_those_of_one_process(world: Worlds, ep: int, assigner: Assigner, balancer: Balancer) -> None:
    """Outputs, gradients, their norm, and after three steps of AdamW weights and prices."""
    runs = world(RANKS).run(train_sharded, ep, assigner, balancer)
    alike(runs, one_process(balancer))
    assert (runs[0].loans > 0) == (assigner is LEAST and ep > 1)
    prices = [value for name, value in runs[0].state.items() if name.endswith("price_E")]
    assert all(price.any() for price in prices)


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("assigner", [AtHome(), LEAST], ids=["home", "least"])
def test_three_steps_are_those_of_one_process_in_float32(world: Worlds, ep: int, assigner: Assigner) -> None:
    """With a balancer whose choices do not turn on the last bit of a score. At EP 4 one rank is left to shard over."""
    balancer = LossFree(step=0.1)
    runs = world(RANKS).run(train_sharded, ep, assigner, balancer, torch.float32)
    alike(runs, one_process(balancer, torch.float32), tolerance=1e-5)
    assert (runs[0].loans > 0) == (assigner is LEAST)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_recomputed_block_gathers_its_experts_again_and_is_exact(world: Worlds, kind: str) -> None:
    runs = world(RANKS).run(train_sharded, 2, LEAST, LossFree(step=0.1), torch.float64, 1, kind)
    alike(runs, one_process(LossFree(step=0.1)))
    assert runs[0].loans > 0


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_gradients_may_be_accumulated_before_they_are_reduced(world: Worlds, reshard: bool) -> None:
    options = {"reshard_after_forward": reshard}
    runs = world(RANKS).run(train_sharded, 2, LEAST, LossFree(), torch.float64, 2, "none", options)
    alike(runs, one_process(LossFree(), micro=2))


def replicated_and_sharded(ep: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """HSDP: two replicas of everything."""
    ranks = dist.get_world_size()
    dense = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    sparse = init_device_mesh("cpu", (2, ranks // 2 // ep, ep), mesh_dim_names=("replicate", "efsdp", "ep"))
    net = parallelize_experts(Net(config(), dtype), sparse["ep"])
    shard(net, mesh=dense, expert_mesh=sparse["replicate", "efsdp"])
    return gradients(net, [dist.get_rank()], dtype)


def gradients(net: nn.Module, mine: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    for rank in mine:
        (loss_of(net, batch(rank, dtype=dtype)) / len(mine)).backward()
    grads = {name: full(weight.grad) for name, weight in net.named_parameters() if weight.grad is not None}
    return grads | {f"norm {p}": grad_norm(net, p) for p in (1.0, 2.0, torch.inf)}


def same(got: dict[str, Tensor], want: dict[str, Tensor], scale: float = 1.0, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert (grad - scale * want[name]).abs().max() <= tolerance * want[name].abs().max() * scale, name


@pytest.mark.parametrize("ep", [1, 2], ids=["sharded", "one rank"])
def test_replicas_that_are_sharded_within_are_exact(world: Worlds, ep: int) -> None:
    dtype, tolerance = (torch.float64, 1e-12) if ep == 1 else (torch.float32, 1e-5)
    want = gradients(Net(config(), dtype), list(range(RANKS)), dtype)
    for got in world(RANKS).run(replicated_and_sharded, ep, dtype):
        same(got, want, tolerance=tolerance)


def without_fsdp() -> tuple[dict[str, Tensor], float]:
    """Experts over all ranks as DTensors, everything else summed by hand: the loss is the sum over the ranks."""
    net = parallelize_experts(Net(config(), torch.float64), init_device_mesh("cpu", (RANKS,)))
    loss_of(net, batch(dist.get_rank(), dtype=torch.float64)).backward()
    for weight in net.parameters():
        if not hasattr(weight, "placements"):
            dist.all_reduce(weight.grad)
    norms = {f"norm {p}": grad_norm(net, p) for p in (1.0, 2.0, torch.inf)}
    grads = {name: full(weight.grad).clone() for name, weight in net.named_parameters() if weight.grad is not None}
    clip_grad_norm(net, 0.1)
    return grads | norms, grad_norm(net).item()


def test_experts_may_be_dtensors_without_fsdp(world: Worlds) -> None:
    want = gradients(Net(config(), torch.float64), list(range(RANKS)))  # of the mean over the ranks
    for got, clipped in world(RANKS).run(without_fsdp):
        same(got, want, scale=RANKS)
        assert clipped == pytest.approx(0.1, rel=1e-4)


def few_experts() -> tuple[dict[str, Tensor], str]:
    net = sharded(Net(config(experts=2), torch.float64), 2)
    return gradients(net, [dist.get_rank()]), str(layers_of(net)[0].experts.up.placements)


def test_one_expert_on_two_ranks_is_sharded_within(world: Worlds) -> None:
    want = gradients(Net(config(experts=2), torch.float64), list(range(RANKS)))
    for got, placements in world(RANKS).run(few_experts):
        assert placements == "(Shard(dim=1), Shard(dim=0))"
        same(got, want)


def some_ranks_have_no_tokens() -> dict[str, Tensor]:
    rank, net = dist.get_rank(), sharded(Net(config(), torch.float64), 2)
    x = batch(rank, dtype=torch.float64)[: 0 if rank % 2 else None]
    net(x).square().sum().backward()
    return {name: full(weight.grad) for name, weight in net.named_parameters() if weight.grad is not None}


def test_ranks_without_tokens_take_part(world: Worlds) -> None:
    net = Net(config(), torch.float64)
    (sum(net(batch(rank, dtype=torch.float64)).square().sum() for rank in (0, 2)) / RANKS).backward()
    want = {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    for got in world(RANKS).run(some_ranks_have_no_tokens):
        same(got, want)


def in_bf16() -> tuple[float, float]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = sharded(Net(config()), 2, mp_policy=policy)
    rank = dist.get_rank()
    loss = loss_of(net, batch(rank))
    loss.backward()
    assert all(weight.dtype == torch.float32 for weight in net.parameters())
    assert layers_of(net)[0].router.price_E.dtype == torch.float32
    return loss.item(), grad_norm(net).item()


def test_fsdps_mixed_precision_reaches_the_experts(world: Worlds) -> None:
    net = Net(config())
    losses = [loss_of(net, batch(rank)) for rank in range(RANKS)]
    sum(loss / RANKS for loss in losses).backward()  # type: ignore[union-attr]
    for loss, (got, norm) in zip(losses, world(RANKS).run(in_bf16)):
        assert got == pytest.approx(loss.item(), rel=2e-2)
        assert got != loss.item()
        assert norm == pytest.approx(grad_norm(net).item(), rel=5e-2)


def infinite_norm() -> list[float]:
    net = sharded(Net(config()), 2)
    loss_of(net, batch(dist.get_rank())).backward()
    grad = layers_of(net)[0].experts.up.grad
    if dist.get_rank() == 3:
        grad.to_local()[0, 0, 0] = float("nan")
    return [grad_norm(net).item(), grad_norm(net, torch.inf).item()]


def test_a_nan_in_one_shard_is_a_nan_on_all_ranks(world: Worlds) -> None:
    for norms in world(RANKS).run(infinite_norm):
        assert all(math.isnan(norm) for norm in norms)


def own_and_held() -> tuple[int, int]:
    net = sharded(Net(config()), 2)
    experts = layers_of(net)[0].experts
    local = sum(weight.to_local().numel() for weight in experts.parameters())
    return local, sum(weight.numel() for weight in experts.parameters())


def test_a_rank_keeps_its_share_and_no_more(world: Worlds) -> None:
    for held, whole in world(RANKS).run(own_and_held):
        assert held * RANKS == whole
