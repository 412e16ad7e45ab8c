"""Epochs: the way from one set of members to another, in the fewest moves."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.epoch import Change, Epoch, changes, same_homes
from placement import Placement, Plan

pytestmark = pytest.mark.fast


@st.composite
def epochs(draw: st.DrawFn) -> Epoch:
    """Two layers of single copies on one to six members, as skewed as they like."""
    ranks, layers = draw(st.integers(1, 6)), []
    for _ in range(2):
        experts = draw(st.integers(1, 12))
        rank_E = draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts))
        rows = [[e for e, rank in enumerate(rank_E) if rank == r] for r in range(ranks)]
        layers.append(Placement(expert_RS=np.array([row + [-1] * (12 - len(row)) for row in rows])))
    members = draw(st.lists(st.integers(1, 40), min_size=ranks, max_size=ranks, unique=True))
    return Epoch(number=draw(st.integers(1, 99)), members=tuple(members), plan=Plan(placement_L=tuple(layers)))


@st.composite
def targets(draw: st.DrawFn) -> tuple[Epoch, tuple[int, ...]]:
    epoch = draw(epochs())
    kept = [member for member in epoch.members if draw(st.booleans())]
    come = draw(st.lists(st.integers(41, 60), max_size=4, unique=True))
    return epoch, (*kept, *come) or epoch.members


@settings(deadline=None)
@given(targets(), st.integers(1, 3))
def test_the_way_to_other_members_is_even_at_its_end_and_moves_what_it_must(
    target: tuple[Epoch, tuple[int, ...]], spare: int
) -> None:
    """E - sum of min(held, to hold): no way has fewer moves."""
    epoch, members = target
    way = changes(epoch, members, {}, spare=spare)
    last, plan, _ = way[-1]
    assert set(last) == set(members)
    assert plan is not None
    assert epoch.plan is not None
    for layer, placement in enumerate(plan.placement_L):
        count_R = placement.held_RE.sum(axis=1)
        assert count_R.max() - count_R.min() <= 1
        held = [len(epoch.experts_of(member, layer)) for member in last]
        least = placement.num_experts - int(np.minimum(held, count_R).sum())
        assert sum(t.layer == layer for *_, transfers in way for t in transfers) == least


@settings(deadline=None)
@given(st.data(), st.sampled_from([0, 1]))
def test_the_way_to_a_plan_ends_in_it_with_copies_or_without(data: st.DataObject, portion: int) -> None:
    """And from where it ends there is no way left."""
    epoch = data.draw(epochs())
    assert epoch.plan is not None
    ranks = len(epoch.members)
    rows_L = [
        [[e for e in range(p.num_experts) if r in homes[e]] for r in range(ranks)]
        for p in epoch.plan.placement_L
        for homes in [[data.draw(st.sets(st.integers(0, ranks - 1), min_size=1)) for _ in range(p.num_experts)]]
    ]
    tables = [np.array([row + [-1] * (12 - len(row)) for row in rows]) for rows in rows_L]
    target = Plan(placement_L=tuple(Placement(expert_RS=table) for table in tables))
    members, plan, _ = changes(epoch, epoch.members, {}, portion=portion, target=target)[-1]
    assert members == epoch.members
    assert same_homes(plan, target)
    there = Epoch(number=epoch.number + 1, members=members, plan=plan)
    assert [(m, t, same_homes(p, plan)) for m, p, t in changes(there, members, {}, target=target)] == [
        (members, (), True)
    ]


def test_a_plan_that_does_not_fit_the_members_is_refused() -> None:
    plan = Plan(placement_L=(Placement(expert_RS=np.arange(8).reshape(2, 4)),))
    epoch = Epoch(number=1, members=(4, 7), plan=plan)
    skewed = Plan(placement_L=(Placement(expert_RS=np.array([[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]])),))
    with pytest.raises(ValueError, match="puts 5 experts of a layer on member 4, which has room for 4"):
        changes(epoch, (4, 7), {4: 4, 7: 4}, target=skewed)
    three = Plan(placement_L=(Placement(expert_RS=np.arange(9).reshape(3, 3)),))
    with pytest.raises(ValueError, match="the plan is for 3 ranks; 2 members serve"):
        changes(epoch, (4, 7), {}, target=three)


@settings(deadline=None)
@given(targets(), st.sampled_from([0, 5, 9]), st.data())
def test_whoever_sends_has_it_and_no_rank_moves_more_bytes_at_once_than_it_may(
    target: tuple[Epoch, tuple[int, ...]], portion: int, data: st.DataObject
) -> None:
    epoch, members = target
    assert epoch.plan is not None
    layers = range(len(epoch.plan.placement_L))
    byte_L = [data.draw(st.integers(1, 5)) for _ in layers]
    held = {(m, layer, e) for layer in layers for m in epoch.members for e in epoch.experts_of(m, layer)}
    for turn, (serving, plan, transfers) in enumerate(changes(epoch, members, {}, portion=portion, byte_L=byte_L)):
        assert all((t.source, t.layer, t.expert) in held for t in transfers)
        held |= {(t.destination, t.layer, t.expert) for t in transfers}
        after = Epoch(number=epoch.number + 1 + turn, members=serving, plan=plan)
        wanted = {(m, layer, e) for layer in layers for m in serving for e in after.experts_of(m, layer)}
        assert wanted <= held
        held = wanted
        for end in ("source", "destination"):
            moved = Counter[int]()
            for t in transfers:
                moved[getattr(t, end)] += byte_L[t.layer]
            assert not portion or max(moved.values(), default=0) <= portion


@settings(deadline=None)
@given(targets())
def test_a_change_survives_its_json(target: tuple[Epoch, tuple[int, ...]]) -> None:
    epoch, members = target
    serving, plan, transfers = changes(epoch, members, {})[0]
    change = Change(old=epoch, new=Epoch(number=100, members=serving, plan=plan), transfer_N=transfers)
    read = Change.read(json.loads(json.dumps(change.fields())))
    assert read.transfer_N == change.transfer_N
    assert (read.union, read.joiners, read.leavers) == (change.union, change.joiners, change.leavers)
    assert read.new.plan is not None
    assert change.new.plan is not None
    assert read.new.plan.fingerprint == change.new.plan.fingerprint


def test_who_has_no_room_is_told_before_anything_moves() -> None:
    plan = Plan(placement_L=(Placement(expert_RS=np.arange(8).reshape(2, 4)),))
    epoch = Epoch(number=1, members=(1, 2), plan=plan)
    with pytest.raises(ValueError, match="8 experts"):
        changes(epoch, (1,), {1: 7})
    assert changes(epoch, (1,), {1: 8})[-1][0] == (1,)
