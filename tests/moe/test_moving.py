"""Experts that move between two steps: the run that moved them is the run that never did, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer

from moe import Loop, Meters, MoE, MoEConfig, World, clip_grad_norm, move_experts, moving, plan_of, settle_prices
from moe.comm import Peers, checksums, sum_over, world_group
from moe.comm import move as transport
from placement import Placement, Plan
from tests.moe.test_checkpoint import CONFIG, Net, assert_same, optimizer_of, together, whole

Worlds = Callable[[int], World]
STEPS = 8
EVEN = replace(CONFIG, dim=8, hidden=8)
WEIGHT = 4 * (16 * 8 + 16 + 8 * 8 + 8)


def plans(ranks: int, copies: bool, seed: int = 0) -> list[Plan]:
    """Where experts go after each step: anywhere, all on one rank, with copies if they may, and home again."""
    random = np.random.default_rng(seed)
    made = []
    for step in range(STEPS):
        layers = []
        for _ in range(2):
            held_RE = np.zeros((ranks, 6), dtype=bool)
            held_RE[random.integers(ranks, size=6) if step != 2 else ranks - 1, np.arange(6)] = True
            if copies:
                held_RE |= random.random((ranks, 6)) < 0.25
            rows = [np.flatnonzero(held_E)[::-1] for held_E in held_RE]  # slots in no particular order
            layers.append(Placement(expert_RS=np.stack([np.pad(r, (0, 6 - len(r)), constant_values=-1) for r in rows])))
        made.append(Plan(placement_L=tuple(layers)))
    return made


def run(plan_S: Sequence[Plan | None], kind: str, config: MoEConfig, most_bytes: float, clip: bool) -> dict[str, Any]:
    """Train, moving towards a plan after each step, or not at all. -> weights and all that the optimiser keeps"""
    net, peers = Net(config), Peers.of(world_group())
    optimizer = optimizer_of(net, kind)
    experts = {id(weight) for layer in (net.first, net.last) for weight in layer.experts.parameters()}
    losses, moves, boundaries = [], 0, 0
    for step, plan in enumerate(plan_S):
        x = torch.randn(24, config.dim, generator=torch.Generator().manual_seed(step))[peers.rank :: peers.size]
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), x.flip(1), reduction="sum").div(24)  # held on to: an old graph must do no harm
        loss.backward()
        sum_over([w.grad for w in net.parameters() if id(w) not in experts and w.grad is not None], peers)
        if clip:
            clip_grad_norm(net, 0.05)
        optimizer.step()
        settle_prices(net)
        losses.append(loss.item())
        if plan is not None:
            optimizer.zero_grad()
            done = move_experts(net, plan, optimizer, most_bytes=most_bytes)
            moves, boundaries = moves + done.moves, boundaries + (not done.done)
    return {**whole(net, optimizer), "losses": np.array(losses), "moves": moves, "late": boundaries}


def ends(world: World, *args: Any) -> tuple[dict[str, Any], int, int]:
    """(what all ranks end with, moves, calls that left some for later)"""
    parts = world.run(run, *args)
    moves, late = ({part.pop(name) for part in parts} for name in ("moves", "late"))
    assert len(moves) == len(late) == 1, "the ranks agree"
    found = together([{n: v for n, v in part.items() if n != "losses"} for part in parts])
    return found | {"losses": np.stack([part["losses"] for part in parts])}, moves.pop(), late.pop()


@pytest.mark.parametrize(
    "ranks, kind, copies", [(2, "adamw", False), (4, "adamw", False), (4, "adamw", True), (2, "masters", True)]
)
def test_a_run_that_moves_its_experts_is_the_one_that_never_did_to_the_bit(
    world: Worlds, ranks: int, kind: str, copies: bool
) -> None:
    """Gradient clipping included, whose norm is a sum over all experts."""
    still, _, _ = ends(world(ranks), [None] * STEPS, kind, EVEN, np.inf, True)
    moved, moves, late = ends(world(ranks), plans(ranks, copies), kind, EVEN, np.inf, True)
    assert moves > 10
    assert late == 0
    assert_same(moved, still)


def test_a_boundary_moves_no_more_bytes_than_it_may_and_training_goes_on_between(world: Worlds) -> None:
    """The plan is asked for again at every boundary until it is reached."""
    weight = 3 * WEIGHT
    wanted = [plans(4, True)[3]] * STEPS
    still, _, _ = ends(world(4), [None] * STEPS, "adamw", EVEN, np.inf, False)
    at_once, moves, _ = ends(world(4), wanted, "adamw", EVEN, np.inf, False)
    slowly, same, late = ends(world(4), wanted, "adamw", EVEN, weight, False)
    assert moves == same > late > 2
    assert_same(at_once, still)
    assert_same(slowly, still)
    with pytest.raises(Exception, match=f"nothing moved: an expert weighs {weight} bytes, more than the {weight - 1}"):
        world(4).run(run, wanted, "adamw", EVEN, weight - 1, False)


def test_what_moved_has_the_numbers_of_its_plan_and_its_home(world: Worlds) -> None:
    world(4).run(_inspected)


def _inspected() -> None:
    net = Net()
    meters = Meters(net)
    target = plans(4, True)[1]
    first = dict(net.first.experts.named_parameters())
    done = move_experts(net, target)
    assert done.moves > 0
    assert done.bytes == done.moves * 4 * (8 * 6 + 8 + 4 * 6 + 6)
    assert np.array_equal([p.held_RE for p in plan_of(net).placement_L], [p.held_RE for p in target.placement_L])
    assert move_experts(net, target).moves == 0
    rank = dist.get_rank()
    for layer, placement in zip((net.first, net.last), target.placement_L):
        assert set(layer.experts.expert_ids) == set(placement.experts_of(rank).tolist())
        assert layer.expert_state().keys() == set(placement.homed_R[rank])
    assert all(weight is first[name] for name, weight in net.first.experts.named_parameters())
    net(torch.randn(5, 6)).sum().backward()
    settle_prices(net)
    told = meters.read(0)
    share_RE = target.placement_L[0].held_RE / target.placement_L[0].copies_E
    load_R = share_RE @ net.first.router.closed["kept_E"].numpy()
    assert told["first"]["rank_peak"] == pytest.approx(load_R.max() / load_R.mean(), rel=1e-5)


@pytest.mark.parametrize("fault", ["gradient", "plan", "ranks", "experts", "counts", "optimiser", "most bytes"])
def test_what_cannot_be_is_one_error_on_every_rank_and_nothing_moves(world: Worlds, fault: str) -> None:
    messages = world(2).run(_refused, fault)
    expected = {
        "gradient": "nothing moved: rank 1: up of layer 0 has a gradient, which would be lost; call zero_grad() first",
        "plan": "nothing moved: the plan differs between rank 0 and ranks [1]",
        "ranks": "nothing moved: the plan is for 3 ranks; layer 0 lives on 2",
        "experts": "nothing moved: cannot go from a plan of 2 layers x 6 experts to one of 2 x 5",
        "counts": "nothing moved: the optimiser's counts differs between rank 0 and ranks [1]",
        "optimiser": "nothing moved: the optimiser does not hold up of layer 0; give the one that does",
        "most bytes": "nothing moved: the setting of most_bytes differs between rank 0 and ranks [1]",
    }[fault]
    assert len(set(messages)) == 1
    assert messages[0].startswith(expected)


def _refused(fault: str) -> str:
    net, odd = Net(), dist.get_rank() == 1
    optimizer: Optimizer = optimizer_of(net)
    net(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    made = plans(2, False)
    target, most_bytes = made[0], 1e9
    if fault == "gradient" and odd:
        net.first.experts.up.grad = torch.zeros_like(net.first.experts.up)
    elif fault == "plan" and odd:
        target = made[1]
    elif fault == "ranks":
        target = plans(3, False)[0]
    elif fault == "experts":
        five = Placement(expert_RS=np.array([[0, 1, 2], [3, 4, -1]]))
        target = Plan(placement_L=(five, five))
    elif fault == "counts" and odd:
        optimizer.state[net.last.experts.down]["step"] += 1
    elif fault == "optimiser":
        optimizer = AdamW(net.middle.parameters())
    elif fault == "most bytes" and odd:
        most_bytes = 2e9
    before, where = whole(net, optimizer) if fault != "optimiser" else {}, plan_of(net)
    with pytest.raises(ValueError) as error:
        move_experts(net, target, optimizer, most_bytes=most_bytes)
    assert plan_of(net) == where
    if before:
        assert_same(whole(net, optimizer), before)
    return str(error.value)


@pytest.mark.parametrize("fault", ["damage", "memory"])
def test_a_wave_that_fails_on_one_rank_is_void_on_all(world: Worlds, fault: str) -> None:
    messages = world(2).run(_failed, fault)
    assert len(set(messages)) == 1
    damaged, short = ([1], []) if fault == "damage" else ([], [1])
    assert f"damaged on their way to ranks {damaged}, and ranks {short} had no memory" in messages[0]


def _failed(fault: str) -> str:
    net = Net()
    where, before = plan_of(net), net.first.experts.up.detach().clone()
    honest = transport.exchange

    def spoil(row_NB: Tensor, *rest: Any) -> Tensor:
        arrived = honest(row_NB, *rest)
        if fault == "damage" and dist.get_rank() == 1 and len(arrived):
            arrived[0, 5] += 1
        return arrived

    def exhausted(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    transport.exchange, restacked = spoil, moving.restacked
    if fault == "memory" and dist.get_rank() == 1:
        moving.restacked = exhausted
    try:
        with pytest.raises(RuntimeError) as error:
            move_experts(net, Plan(placement_L=(_all_on(1), where.placement_L[1])))
    finally:
        transport.exchange, moving.restacked = honest, restacked
    assert plan_of(net) == where
    assert torch.equal(net.first.experts.up, before)
    return str(error.value)


def _all_on(rank: int) -> Placement:
    expert_RS = np.full((2, 6), -1)
    expert_RS[rank] = np.arange(6)
    return Placement(expert_RS=expert_RS)


@pytest.mark.fast
def test_a_changed_word_and_a_swap_of_two_change_the_checksum() -> None:
    row_NB = torch.randint(0, 256, (50, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    good = checksums(row_NB)
    for byte in range(64):
        bad = row_NB.clone()
        bad[:, byte] += 1
        assert (checksums(bad) != good).all()
    assert (checksums(row_NB.view(50, 8, 8).flip(1).reshape(50, 64)) != good).all()


@pytest.mark.fast
def test_one_process_has_nowhere_to_move_to_and_says_so() -> None:
    layer = MoE(replace(CONFIG, compute=Loop()))
    target = Plan(placement_L=(Placement(expert_RS=np.array([[3, 1, 2, 0, 5, 4]])),))
    assert move_experts(layer, target).done
    with pytest.raises(ValueError, match="the plan is for 2 ranks; layer 0 lives on 1"):
        move_experts(layer, Plan(placement_L=(_all_on(1),)))
