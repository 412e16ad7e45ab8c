"""Guests: however long they stay, the layer is the same function; those that stay do not travel again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe import KeepGuests, MoE, MoEConfig, RefetchGuests, World, WorldError, lasting_visits
from moe.comm import Lending, Peers
from moe.guestbook import Guestbook
from routing import LeastLoaded
from tests.world import KINDS, against_reference, run, tokens

Worlds = Callable[[int], World]
CONFIG = MoEConfig(dim=8, hidden=12, num_experts=6, top_k=2, bias=True, assigner=LeastLoaded(headroom=1.0, min_chunk=1))
REFETCH = MoEConfig(
    dim=8, hidden=12, num_experts=6, top_k=2, bias=True, assigner=CONFIG.assigner, guests=RefetchGuests()
)


@pytest.mark.parametrize("recompute", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_guests_that_leave_and_come_again_change_nothing(world: Worlds, ranks: int, recompute: str) -> None:
    tokens_R = [20, 0, 7, 12][:ranks]
    for seen in world(ranks).run(_against_reference, tokens_R, recompute):
        assert seen.loans > 0
        assert seen.error < 1e-10, seen.worst


def _against_reference(tokens_R: list[int], recompute: str) -> Any:
    return against_reference(REFETCH, tokens_R, skew=3.0, recompute=recompute)


def test_guests_that_leave_are_not_in_memory_between_forward_and_backward(world: Worlds) -> None:
    for kept, refetched, guests_bytes in world(2).run(_kept):
        assert kept - refetched == guests_bytes
    assert any(guests_bytes for _, _, guests_bytes in world(2).run(_kept))


def _kept() -> tuple[int, int, int]:
    guests: list[int] = []
    sizes = []
    for config in (CONFIG, REFETCH):
        layer, x_TD = _layer(config), _tokens()
        layer.observe(lambda choice, assignment, layer=layer: guests.append(_guests_of(layer, assignment)))
        kept: dict[int, int] = {}
        own = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}

        def pack(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y_TD = layer(x_TD)
        sizes.append(sum(kept.values()))
        y_TD.sum().backward()
    width = sum(weight[0].numel() * 8 for weight in _layer(CONFIG).experts.parameters())
    return sizes[0], sizes[1], guests[0] * width


def _guests_of(layer: MoE, assignment: Any) -> int:
    return sum(loan.borrower == layer.peers.rank for loan in assignment.loans(layer.placement))


def _layer(config: MoEConfig) -> MoE:
    torch.manual_seed(0)
    return MoE(config, dist.group.WORLD, dtype=torch.float64)


def _tokens(seed: int = 1) -> Tensor:
    return tokens(8, [16] * dist.get_world_size(), 3.0, torch.float64, seed)[dist.get_rank()]


@pytest.mark.parametrize("most", [1, 8])
def test_guests_that_last_do_not_travel_again_and_change_nothing(world: Worlds, most: int) -> None:
    for same, every, lasting, distinct in world(4).run(_lasting, most):
        assert same
        assert distinct < every
        assert distinct <= lasting <= every
        if most == 8:
            assert lasting == distinct


def _lasting(most: int) -> tuple[bool, int, int, int]:
    """Micro-batches with and without. -> equal to the bit; experts that travelled without, with, and different ones"""
    sent: list[int] = []
    visits: set[tuple[int, int]] = set()
    totals = []
    fetch = Lending.fetch

    def counted(lending: Lending, weights: Any) -> Any:
        sent.append(lending.guests)
        return fetch(lending, weights)

    answers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lending, "fetch", counted)
        for open_book in (False, True):
            layer = _layer(CONFIG)
            layer.observe(
                lambda _, assignment, layer=layer: visits.update(
                    (loan.borrower, loan.expert) for loan in assignment.loans(layer.placement)
                )
            )
            sent.clear()
            with lasting_visits(layer, most=most) if open_book else nullcontext():
                outs = []
                for seed in (1, 2, 1, 3, 2):
                    outs.append(layer(_tokens(seed)))
                    outs[-1].square().sum().backward()
            answers.append([*outs, *(weight.grad for weight in layer.parameters())])
            total = torch.tensor(sum(sent))
            dist.all_reduce(total)
            totals.append(int(total))
    same = all(torch.equal(left, right) for left, right in zip(*answers, strict=True))
    return same, totals[0], totals[1], len(visits)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_guests_that_last_may_have_come_before_a_recomputation(world: Worlds, kind: str) -> None:
    assert all(world(3).run(_recomputed, kind))


def _recomputed(kind: str) -> bool:
    answers = []
    for each, open_book in (("none", False), (kind, True)):
        layer = _layer(replace(CONFIG, bias=False))
        with lasting_visits(layer) if open_book else nullcontext():
            for seed in (1, 2):
                run(each, layer, _tokens(seed).requires_grad_()).square().sum().backward()  # type: ignore[no-untyped-call]
        answers.append([weight.grad for weight in layer.parameters()])
    return all(torch.equal(left, right) for left, right in zip(*answers, strict=True))


def test_weights_that_change_while_guests_last_are_one_error_on_every_rank(world: Worlds) -> None:
    with pytest.raises(WorldError) as caught:
        world(2).run(_changed)
    assert str(caught.value).count("bad input on rank 1") == 2
    assert "leave it before the optimiser steps" in str(caught.value)


def _changed() -> None:
    layer = _layer(CONFIG)
    with lasting_visits(layer):
        layer(_tokens())
        if dist.get_rank() == 1:
            with torch.no_grad():
                layer.experts.up.mul_(2)
        layer(_tokens())


def test_experts_frozen_on_some_ranks_alone_are_one_error_where_experts_visit(world: Worlds) -> None:
    with pytest.raises(WorldError) as caught:
        world(2).run(_frozen)
    assert str(caught.value).count("other weights of the experts learn on ranks [1]") == 2


def _frozen() -> None:
    layer = _layer(CONFIG)
    if dist.get_rank() == 1:
        layer.experts.up.requires_grad_(False)
    layer(_tokens())


def test_after_lasting_visits_nobody_stays(world: Worlds) -> None:
    assert all(world(2).run(_afterwards))


def _afterwards() -> bool:
    layer = _layer(CONFIG)
    with lasting_visits(layer):
        before = layer(_tokens())
    with torch.no_grad():
        layer.experts.down.neg_()
        layer.experts.down_bias.neg_()
    return torch.equal(layer(_tokens()), -before)


def test_guests_do_not_stay_for_a_step_in_another_type(world: Worlds) -> None:
    for same, loans in world(2).run(_two_types):
        assert same
        assert loans > 0


def _two_types() -> tuple[bool, int]:
    layer, x_TD, loans = _layer(CONFIG).float(), _tokens().float(), []
    layer.observe(lambda choice, assignment: loans.append(len(assignment.loans(layer.placement))))

    def step(narrow: bool) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return layer(x_TD)  # type: ignore[no-any-return]

    want = [step(narrow) for narrow in (True, False, True)]
    with lasting_visits(layer):
        got = [step(narrow) for narrow in (True, False, True)]
    return all(torch.equal(left, right) for left, right in zip(got, want, strict=True)), min(loans)


@pytest.mark.fast
def test_lasting_visits_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="most=0"), lasting_visits(MoE(CONFIG), most=0):
        pass
    with pytest.raises(ValueError, match="no MoE layer"), lasting_visits(torch.nn.Linear(2, 2)):
        pass
    assert MoE(CONFIG).config.guests == KeepGuests()


def test_a_guest_that_stays_keeps_no_memory_of_those_it_came_with() -> None:
    book = Guestbook(1, Peers.of(None))
    book._held_R = [{2: None}]
    message = torch.randn(3, 20)
    ups, downs = message[:, :12].view(3, 3, 4), message[:, 12:].view(3, 2, 4)
    first = book.join([0, 1, 2], [0, 1, 2], [ups, downs], [ups, downs])
    assert sum(part.untyped_storage().nbytes() for part in book._guests[2]) == 20 * message.itemsize
    again = book.join([2], [], [], [ups, downs])
    assert all(torch.equal(stack[2], stayed[0]) for stack, stayed in zip(first, again, strict=True))
