"""Going back: whatever happened to a model and its optimiser since, they are as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import AdamW

from moe import MoE
from moe.belongings import Belongings, packed
from moe.recovery import Mark, Saved
from moe.snapshot import Snapshot
from tests.moe.live.trainee import Net, State, learn, optimizer_of, state_of

pytestmark = pytest.mark.fast
ALL = tuple(range(8))


def taken(net: Net, optimizer: AdamW, room: Snapshot | None = None) -> Snapshot:
    saved = Saved(mark=Mark(1, 0), members=(1,), held_L=tuple(ids_of(net)), backup_L=((), ()))
    return Snapshot(saved, net, optimizer, room)


def ids_of(net: Net) -> list[tuple[int, ...]]:
    return [layer.experts.expert_ids for layer in net.layers if isinstance(layer, MoE)]


def run(net: Net, optimizer: AdamW, steps: range) -> list[State]:
    states = []
    for step in steps:
        learn(net, optimizer, step, 0, 1, luck=True)
        states.append(state_of(net, optimizer, luck=True))
    return states


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@settings(max_examples=10, deadline=None)
@given(before=st.integers(0, 2), after=st.integers(0, 2), scribbled=st.booleans())
def test_the_steps_done_again_are_the_steps_that_were_done(before: int, after: int, scribbled: bool) -> None:
    """Also where there was none before, and the optimiser kept nothing."""
    net = Net()
    optimizer = optimizer_of(net)
    torch.manual_seed(1)
    run(net, optimizer, range(before))
    old = taken(net, optimizer)
    snapshot = taken(net, optimizer, room=old)
    first = run(net, optimizer, range(before, before + after))
    if scribbled:
        for weight in net.parameters():
            weight.data.fill_(7.0)
        for state in optimizer.state.values():
            state["exp_avg"].fill_(7.0)
        optimizer.param_groups[0]["weight_decay"] = 7.0
    snapshot.finish()
    snapshot.put_back(net, optimizer, ids_of(net))
    assert bool(optimizer.state) == bool(before)
    again = run(net, optimizer, range(before, before + after))
    assert all(same(one, other) for one, other in zip(first, again, strict=True))


def test_experts_come_from_the_stack_of_then_and_from_what_was_kept_for_others() -> None:
    """In any order, with their moments; and a snapshot is not worn out by going back to it."""
    net = Net()
    optimizer = optimizer_of(net)
    [then] = run(net, optimizer, range(1))
    snapshot = taken(net, optimizer)
    rows = {}
    for number, layer in enumerate(net.layers):
        assert isinstance(layer, MoE)
        belongings = Belongings.of(layer, optimizer)
        rows |= {(number, e): packed(belongings.stacked, e, belongings.expert_bytes) for e in (6, 7)}
    snapshot.put_back(net, optimizer, [(0, 1, 2, 3, 4, 5)] * 2)
    part = taken(net, optimizer)
    for cell, row_B in rows.items():
        part.keep(cell, row_B, None)
    for _ in range(2):
        part.put_back(net, optimizer, [(7, 0, 3)] * 2)
        assert ids_of(net) == [(7, 0, 3)] * 2
        now = state_of(net, optimizer, luck=False)
        assert all(np.array_equal(now[key], then[key]) for key in now)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
    snapshot.put_back(net, optimizer, [ALL, ALL])
    assert same(state_of(net, optimizer, luck=True), then)
