"""Migrations: the fewest moves there are, in waves that never hold too much and never get stuck."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import (
    Affinity,
    Migration,
    Packed,
    Placement,
    Plan,
    Rebalance,
    StrictGroups,
    Topology,
    as_given,
    migrate,
    moved,
    padded,
    rename_nodes,
    rename_ranks,
)
from placement.groups import stray_L
from placement.metrics import local_L, moves_L
from placement.plan import EMPTY
from placement.rename import machine_of
from tests.placement.strategies import choices, drawn_loads

pytestmark = pytest.mark.fast


@st.composite
def placements(draw: st.DrawFn, num_experts: int, ranks: int, *, copies: bool = True) -> Placement:
    """Any placement: crowded ranks, empty ones, copies."""
    held_RE = np.zeros((ranks, num_experts), dtype=bool)
    for expert in range(num_experts):
        most = draw(st.sampled_from([1, 1, 1, min(2, ranks), ranks])) if copies else 1
        held_RE[draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=most)), expert] = True
    return held(held_RE)


def held(held_RE: np.ndarray) -> Placement:
    expert_RS = np.full((len(held_RE), held_RE.sum(axis=1).max()), EMPTY)
    for rank, held_E in enumerate(held_RE):
        expert_RS[rank, : held_E.sum()] = np.flatnonzero(held_E)
    return Placement(expert_RS=expert_RS)


def at(*rows: list[int]) -> Plan:
    width = max(map(len, rows))
    return Plan(placement_L=(Placement(expert_RS=np.array([row + [EMPTY] * (width - len(row)) for row in rows])),))


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Plan, Plan, int, int]:
    """(start, target, spare, ranks per node) on any numbers of ranks."""
    num_experts, ranks = draw(st.integers(1, 12)), draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    start, target = (Plan(placement_L=tuple(draw(placements(num_experts, count)) for _ in range(2))) for count in ranks)
    return start, target, draw(st.integers(1, 3)), draw(st.integers(1, 6))


def replay(migration: Migration) -> tuple[Placement, ...]:
    """Walk through the waves, holding every one to its laws. -> where it ends"""
    now = list(padded(migration.start, migration.ranks))
    final = padded(migration.target, migration.ranks)
    most_LR = [np.maximum(a.held_RE.sum(axis=1), b.held_RE.sum(axis=1)) + migration.spare for a, b in zip(now, final)]
    fewest_LE = [np.minimum(a.copies_E, b.copies_E) for a, b in zip(now, final)]
    for wave in migration.wave_N:
        before = now[wave.layer]
        left = before.held_RE.copy()
        for rank, expert in wave.freed_N:
            assert left[rank, expert]
            left[rank, expert] = False
        resident_R = left.sum(axis=1)
        for move in wave.move_N:
            assert left[move.source, move.expert], "a rank sends what it holds"
            assert not left[move.destination, move.expert], "nobody gets what it has"
            assert move.vacates == -1 or left[move.vacates, move.expert]
            resident_R[move.destination] += 1
        assert (resident_R <= most_LR[wave.layer]).all()
        now[wave.layer] = wave.after
        assert np.array_equal(moved(before, wave.move_N, wave.freed_N).held_RE, wave.after.held_RE)
        assert (wave.after.copies_E >= fewest_LE[wave.layer]).all(), "an expert was short of copies on the way"
    return tuple(now)


@given(journeys())
@settings(max_examples=50, deadline=None)
def test_waves_reach_the_target_within_their_memory_and_never_get_stuck(journey: tuple[Plan, Plan, int, int]) -> None:
    start, target, spare, _ = journey
    migration = migrate(start, target, spare=spare, naming=as_given)
    for end, wanted in zip(replay(migration), padded(target, migration.ranks)):
        assert np.array_equal(end.held_RE, wanted.held_RE)
    pairs = zip(padded(start, migration.ranks), padded(target, migration.ranks))
    assert migration.moves == sum(int((new.held_RE & ~old.held_RE).sum()) for old, new in pairs)


def test_a_full_circle_of_swaps_takes_one_spare_slot() -> None:
    start, target = at([0, 1], [2, 3], [4, 5]), at([4, 5], [0, 1], [2, 3])
    migration = migrate(start, target, naming=as_given)
    replay(migration)
    assert (migration.moves, len(migration.wave_N)) == (6, 2)
    assert migrate(start, target).moves == 0, "with other names nothing moves"
    with pytest.raises(ValueError, match="spare=0; a rank needs room"):
        migrate(start, target, spare=0)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2), st.data())
@settings(max_examples=50, deadline=None)
def test_a_free_target_is_even_and_meets_the_lower_bound(
    num_experts: int, ranks: int, later: int, spare: int, data: st.DataObject
) -> None:
    start = Plan(placement_L=(data.draw(placements(num_experts, ranks, copies=False)),))
    slots = -(-num_experts // later) + spare
    topology = Topology.even(ranks=later, slots=slots, ranks_per_node=data.draw(st.integers(1, later)))
    migration = migrate(start, topology)
    replay(migration)
    count_R = migration.target.placement_L[0].held_RE.sum(axis=1)
    held_R = np.pad(start.placement_L[0].held_RE.sum(axis=1), (0, 8))[: max(ranks, later)]
    wanted_R = np.pad(count_R, (0, 8))[: max(ranks, later)]
    assert count_R.max() - count_R.min() <= 1
    assert migration.moves == num_experts - int(np.minimum(held_R, wanted_R).sum())
    odd = num_experts % later
    even = [
        num_experts // later + (rank in extra) for extra in combinations(range(later), odd) for rank in range(later)
    ]
    bounds = np.minimum(held_R[:later], np.array(even).reshape(-1, later)).sum(axis=1)
    assert migration.moves == num_experts - bounds.max(), "another even count would have needed fewer"


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
@settings(max_examples=40, deadline=None)
def test_with_copies_no_target_of_the_same_counts_is_nearer(
    num_experts: int, ranks: int, later: int, data: st.DataObject
) -> None:
    """Against every placement there is."""
    start = Plan(placement_L=(data.draw(placements(num_experts, ranks)),))
    slots = -(-num_experts // later) + data.draw(st.integers(0, 3))
    topology = Topology.even(ranks=later, slots=slots, ranks_per_node=data.draw(st.integers(1, later)))
    migration = migrate(start, topology)
    replay(migration)
    found = migration.target.placement_L[0]
    held_RE = np.pad(start.placement_L[0].held_RE, ((0, 3), (0, 0)))[:later]
    node_R = np.array(topology.node_R)
    near_RE = (node_R[:, None] == node_R) @ held_RE.astype(int) > 0

    def cost(new_RE: np.ndarray) -> tuple[int, int]:
        return int((new_RE & ~held_RE).sum()), int((new_RE & ~near_RE).sum())

    best = min(
        cost(new_RE)
        for bits in product([False, True], repeat=later * num_experts)
        if ((new_RE := np.array(bits).reshape(later, -1)).sum(axis=0) == found.copies_E).all()
        and (new_RE.sum(axis=1) == found.held_RE.sum(axis=1)).all()
    )
    assert cost(found.held_RE) == best


def test_copies_are_kept_as_far_as_there_is_room() -> None:
    start = at([0, 1, 2], [0, 3, 4], [0, 5, 6])
    kept = migrate(start, Topology.even(ranks=4, slots=3, ranks_per_node=4)).target.placement_L[0]
    assert kept.copies_E.tolist() == [3, 1, 1, 1, 1, 1, 1]
    fewer = migrate(start, Topology.even(ranks=2, slots=4, ranks_per_node=2)).target.placement_L[0]
    assert fewer.copies_E.tolist() == [2, 1, 1, 1, 1, 1, 1]


def test_a_rank_without_slots_is_drained_and_others_stay_as_they_are() -> None:
    start = at([0, 1, 2], [3, 4, 5], [6, 7, 8])
    migration = migrate(start, Topology(slots_R=(5, 0, 5), ranks_per_node=3))
    assert migration.target.placement_L[0].held_RE.sum(axis=1).tolist() == [5, 0, 4]
    assert migration.moves == 3
    assert {move.source for wave in migration.wave_N for move in wave.move_N} == {1}


@given(st.integers(2, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_ranks_of_an_imposed_target_are_named_so_that_fewest_experts_move(ranks: int, data: st.DataObject) -> None:
    """Against every naming of alike ranks."""
    slots_R = tuple(data.draw(st.sampled_from([8, 8, 9])) for _ in range(ranks))
    topology = Topology(slots_R=slots_R, ranks_per_node=ranks)
    old, new = data.draw(placements(8, ranks)), data.draw(placements(8, ranks))
    start, target = Plan(placement_L=(old,)), Plan(placement_L=(new,), topology=topology)
    migration = migrate(start, target)
    names = [n for n in permutations(range(ranks)) if [slots_R[r] for r in n] == list(slots_R)]
    assert migration.moves == min(int((new.held_RE[list(name)] & ~old.held_RE).sum()) for name in names)
    assert sorted(map(tuple, migration.target.placement_L[0].held_RE)) == sorted(map(tuple, new.held_RE))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_nodes_stay_whole_under_the_names_with_fewest_bytes(data: st.DataObject) -> None:
    """Against every naming that takes nodes to nodes, the same in both layers."""
    topology = Topology.even(ranks=4, slots=8, ranks_per_node=2)
    start, target = (Plan(placement_L=tuple(data.draw(placements(8, 4)) for _ in range(2))) for _ in range(2))
    named = rename_nodes(start, replace(target, topology=topology), (1, 3))

    def bytes_of(table: list[int] | slice, plan: Plan) -> int:
        pairs = zip((1, 3), start.placement_L, plan.placement_L)
        return sum(weight * int((new.held_RE[table] & ~old.held_RE).sum()) for weight, old, new in pairs)

    names = [[a, b, c, d] for a, b, c, d in permutations(range(4)) if a // 2 == b // 2]
    assert bytes_of(slice(None), named) == min(bytes_of(name, target) for name in names)


def test_what_must_move_moves_within_its_node() -> None:
    start = at([4, 5, 6, 7], [], [0, 1, 2, 3], [])
    migration = migrate(start, Topology.even(ranks=4, slots=2, ranks_per_node=2))
    assert [sorted(row) for row in migration.target.placement_L[0].expert_RS.tolist()][1::2] == [[6, 7], [2, 3]]
    assert all(move.source // 2 == move.destination // 2 for wave in migration.wave_N for move in wave.move_N)


def test_names_never_break_what_a_plan_claims_of_nodes_and_hops() -> None:
    trace = choices(0, tokens=300, layers=3, experts=16, top_k=2)
    topology = Topology.even(ranks=4, slots=5, ranks_per_node=2)
    start = Packed()(trace, topology)
    for planner in (StrictGroups(groups=4), Affinity(balance_cap=1.3)):
        target = planner(trace, topology)
        named = migrate(start, target).target
        assert moves_L(start, named).sum() <= moves_L(start, target).sum()
        for group_R in (range(4), topology.node_R):
            before, after = (local_L(plan, trace.follow_LEE, group_R) for plan in (target, named))
            np.testing.assert_allclose(before, after)
        stray = [stray_L(plan.placement_L, trace.load_LE, topology, 4) for plan in (target, named)]
        np.testing.assert_allclose(stray[0], stray[1], atol=1e-12)
    free = rename_ranks(start, target, (1,) * 3)
    assert moves_L(start, free).sum() <= moves_L(start, named).sum()


def test_an_expert_comes_from_its_own_node_if_it_can() -> None:
    start, target = at([0, 1], [2], [0, 3], [4]), at([1], [0, 2], [3], [0, 4])
    topology = Topology.even(ranks=4, slots=2, ranks_per_node=2)
    target = Plan(placement_L=target.placement_L, topology=topology)
    moves = [move for wave in migrate(start, target, naming=as_given).wave_N for move in wave.move_N]
    assert [(move.source, move.destination, move.vacates) for move in moves] == [(0, 1, 0), (2, 3, 2)]


@given(journeys(), st.integers(3, 30))
@settings(max_examples=40, deadline=None)
def test_no_rank_sends_or_receives_more_than_may_move_at_a_boundary(
    journey: tuple[Plan, Plan, int, int], most_bytes: int
) -> None:
    start, target, spare, _ = journey
    migration = migrate(start, target, spare=spare, byte_L=(2, 3), naming=as_given)
    portions = list(migration.boundaries(most_bytes))
    for portion in portions:
        sent_R, got_R = np.zeros(6), np.zeros(6)
        for wave in portion:
            for move in wave.move_N:
                sent_R[move.source] += migration.byte_L[wave.layer]
                got_R[move.destination] += migration.byte_L[wave.layer]
        assert max(sent_R.max(), got_R.max()) <= most_bytes
        assert portion
    whole = replace(migration, wave_N=tuple(wave for portion in portions for wave in portion))
    assert (whole.moves, whole.bytes) == (migration.moves, migration.bytes)
    for end, wanted in zip(replay(whole), padded(target, migration.ranks)):
        assert np.array_equal(end.held_RE, wanted.held_RE)


def test_an_expert_too_heavy_for_any_boundary_is_an_error_before_anything_moves() -> None:
    migration = migrate(at([0, 1], [2]), at([0], [1, 2]), byte_L=(100,), naming=as_given)
    with pytest.raises(ValueError, match="an expert weighs 100 bytes, more than the 99 that may move at a boundary"):
        next(migration.boundaries(99))


def test_what_cannot_be_is_an_error_that_says_why() -> None:
    start = at([0, 1, 2], [3, 4, 5])
    with pytest.raises(ValueError, match="6 experts do not fit 2 ranks with 4 slots in all; use slots >= 3 a rank"):
        migrate(start, Topology.even(ranks=2, slots=2, ranks_per_node=2))
    with pytest.raises(ValueError, match="1 layers x 6 experts to one of 1 x 3; use plans of one model"):
        migrate(start, at([0], [1, 2]))
    with pytest.raises(ValueError, match="byte_L needs a number >= 1 for each of 1 layers"):
        migrate(start, start, byte_L=(0,))


@given(journeys())
@settings(max_examples=30, deadline=None)
def test_a_migration_is_the_same_wherever_it_is_planned(journey: tuple[Plan, Plan, int, int]) -> None:
    start, target, spare, _ = journey
    again = [Plan.from_json(plan.to_json()) for plan in (start, target)]
    assert migrate(start, target, spare=spare) == migrate(*again, spare=spare)


def test_a_rebalanced_plan_is_reached_in_the_moves_that_it_counted() -> None:
    old, new = drawn_loads(0, layers=3), drawn_loads(5, layers=3)
    start = Packed()(old, Topology.even(ranks=8, slots=5, ranks_per_node=4))
    target = Rebalance(start=start, most_moves=6)(new, start.topology)
    migration = migrate(start, target)
    replay(migration)
    assert 0 < migration.moves <= moves_L(start, target).sum()


def test_a_plan_that_names_no_machine_is_judged_on_one_that_holds_its_widest_layer() -> None:
    narrow, wide = (Placement(expert_RS=np.array(rows)) for rows in ([[0, 1], [2, 3]], [[0, 1, 2], [3, 0, 1]]))
    assert machine_of(Plan(placement_L=(narrow, wide))).slots_R == (3, 3)
