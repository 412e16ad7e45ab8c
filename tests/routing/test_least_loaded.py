"""LeastLoaded: the peak it promises, with no needless, repeated or far visit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing import AtHome, LeastLoaded
from tests.contracts import HARD_BATCHES, check_assigner, check_refuses_foreign_tables
from tests.routing.batches import LAW, Batch, at_homes, balanced_batches, batches, contiguous, crumbs, scattered, zipf

pytestmark = pytest.mark.fast

HEADROOMS = st.sampled_from([1.0, 1.01, 1.05, 1.2, 1.5, 3.0])
PLANNERS = st.builds(LeastLoaded, headroom=HEADROOMS, min_chunk=st.sampled_from([1, 1, 2, 7, 40, 1000]))


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Batch, LeastLoaded]:
    """A batch and a planner: any of both, or a chunk hardly bigger than the room there is."""
    if draw(st.integers(0, 2)):
        return draw(batches()), draw(PLANNERS)
    batch, chunk = draw(crumbs())
    return batch, LeastLoaded(headroom=1.0, min_chunk=chunk)


def capacity(planner: LeastLoaded, batch: Batch) -> int:
    return math.ceil(planner.headroom * int(batch.load_E.sum()) / batch.placement.ranks)


@pytest.mark.parametrize("name", HARD_BATCHES)
@pytest.mark.parametrize("planner", [LeastLoaded(), LeastLoaded(headroom=1.0, min_chunk=30), LeastLoaded(headroom=1.3)])
def test_least_loaded_keeps_the_contract_on_hard_batches(planner: LeastLoaded, name: str) -> None:
    decided = check_assigner(planner, HARD_BATCHES[name])
    assert decided.load_R.max() <= capacity(planner, HARD_BATCHES[name]) + planner.min_chunk


@LAW
@given(tasks())
def test_least_loaded_keeps_the_contract(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    check_assigner(planner, batch)


def test_least_loaded_refuses_a_table_for_other_ranks_or_experts() -> None:
    check_refuses_foreign_tables(LeastLoaded())


@settings(LAW, max_examples=1000)
@given(tasks())
def test_no_rank_exceeds_its_headroom_by_more_than_a_chunk(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    peak = planner(*batch).load_R.max()
    assert peak <= capacity(planner, batch) + planner.min_chunk


@LAW
@given(batches(), HEADROOMS)
def test_with_chunks_of_one_row_no_rank_exceeds_its_headroom_at_all(batch: Batch, headroom: float) -> None:
    planner = LeastLoaded(headroom=headroom)
    assert planner(*batch).load_R.max() <= capacity(planner, batch)


@settings(LAW, max_examples=300)
@given(tasks())
def test_a_rank_at_or_under_its_capacity_keeps_all_rows_of_its_experts(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    quota_RE = planner(*batch).quota_RE
    for expert, home in enumerate(batch.placement.home_E):
        if batch.home_R[home] <= capacity(planner, batch):
            assert quota_RE[home, expert] == batch.load_E[expert]


def test_a_rank_that_took_a_chunk_too_many_does_not_pass_it_on() -> None:
    """Room 5 takes 15 rows, a chunk of 10 above capacity: as much as is allowed, and no reason to export."""
    batch = Batch(np.diag([115, 95, 95, 95]), contiguous(4, 4))
    quota_RE = LeastLoaded(headroom=1.0, min_chunk=10)(*batch).quota_RE
    assert np.diag(quota_RE)[1:].tolist() == [95, 95, 95]


@LAW
@given(tasks())
def test_an_overloaded_rank_gives_no_more_than_its_excess_and_takes_nothing(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    decided, most = planner(*batch), capacity(planner, batch)
    for rank in np.flatnonzero(batch.home_R > most):
        assert decided.load_R[rank] >= most
        assert not decided.quota_RE[rank, batch.placement.home_E != rank].any()


@LAW
@given(tasks())
def test_a_visit_brings_a_chunk_or_all_that_home_has_left_of_its_expert(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    decided = planner(*batch)
    for loan in decided.loans(batch.placement):
        brought = decided.quota_RE[loan.borrower, loan.expert]
        assert brought >= planner.min_chunk or decided.quota_RE[loan.lender, loan.expert] == 0


def test_an_excess_below_a_chunk_stays_at_home_though_there_is_room() -> None:
    """13 rows too many, room for them in pieces of 1 and 2: one visit of 10 rows, and the 3 stay."""
    batch = Batch(np.diag([113, 98, 98, 98, 98, 98, 98, 99]), contiguous(8, 8))
    decided = LeastLoaded(headroom=1.0, min_chunk=10)(*batch)
    assert decided.load_R[0] == 103
    assert len(decided.loans(batch.placement)) == 1


@LAW
@given(tasks())
def test_no_expert_visits_a_rank_twice_or_stays_where_it_lives(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    visits = [(loan.expert, loan.borrower) for loan in planner(*batch).loans(batch.placement)]
    assert len(set(visits)) == len(visits)
    assert not any(batch.placement.held_RE[borrower, expert] for expert, borrower in visits)


@LAW
@given(batches(), HEADROOMS)
def test_nothing_is_lent_while_the_peak_is_within_the_headroom(batch: Batch, headroom: float) -> None:
    peak = int(batch.home_R.max())
    needed = peak * batch.placement.ranks / max(int(batch.load_E.sum()), 1)
    planner = LeastLoaded(headroom=max(headroom, needed))
    assert planner(*batch).quota_RE.tobytes() == AtHome()(*batch).quota_RE.tobytes()


@LAW
@given(balanced_batches(), PLANNERS)
def test_a_balanced_batch_is_assigned_as_at_home_to_the_bit(batch: Batch, planner: LeastLoaded) -> None:
    decided = planner(*batch)
    assert decided.quota_RE.tobytes() == AtHome()(*batch).quota_RE.tobytes()
    assert decided.loans(batch.placement) == ()


@LAW
@given(batches(), PLANNERS, st.integers(0, 2**16))
def test_quotas_depend_on_the_loads_alone_not_on_where_rows_come_from(
    batch: Batch, planner: LeastLoaded, seed: int
) -> None:
    elsewhere = scattered(batch.load_E.tolist(), batch.placement.ranks, seed)
    assert np.array_equal(planner(elsewhere, batch.placement).quota_RE, planner(*batch).quota_RE)


@st.composite
def batches_on_nodes(draw: st.DrawFn) -> tuple[Batch, tuple[int, ...]]:
    batch = draw(batches(copies=False))
    ranks = batch.placement.ranks
    return batch, tuple(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))


@settings(LAW, max_examples=200)
@given(batches_on_nodes(), HEADROOMS)
def test_no_loan_crosses_nodes_if_the_lenders_node_has_enough_room(
    batch_and_nodes: tuple[Batch, tuple[int, ...]], headroom: float
) -> None:
    batch, node_R = batch_and_nodes
    planner = LeastLoaded(headroom=headroom, node_R=node_R)
    spare_R = capacity(planner, batch) - batch.home_R
    roomy = {node for node in node_R if spare_R[np.equal(node_R, node)].sum() >= 0}
    for loan in planner(*batch).loans(batch.placement):
        if node_R[loan.lender] in roomy:
            assert node_R[loan.borrower] == node_R[loan.lender]


@LAW
@given(batches_on_nodes(), PLANNERS)
def test_nodes_change_who_borrows_but_not_the_promise(
    batch_and_nodes: tuple[Batch, tuple[int, ...]], planner: LeastLoaded
) -> None:
    batch, node_R = batch_and_nodes
    aware = LeastLoaded(headroom=planner.headroom, min_chunk=planner.min_chunk, node_R=node_R)
    decided = check_assigner(aware, batch)
    assert decided.load_R.max() <= capacity(aware, batch) + aware.min_chunk


@LAW
@given(tasks())
def test_one_node_is_no_node(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    aware = LeastLoaded(headroom=planner.headroom, min_chunk=planner.min_chunk, node_R=(3,) * batch.placement.ranks)
    assert np.array_equal(aware(*batch).quota_RE, planner(*batch).quota_RE)


def test_on_realistic_batches_nodes_keep_visits_near() -> None:
    near, far = 0, 0
    node_R = (0, 0, 0, 0, 1, 1, 1, 1)
    for seed in range(10):
        batch = Batch(zipf(32, 8, 0.8, seed), contiguous(32, 8))
        for planner in (LeastLoaded(), LeastLoaded(node_R=node_R)):
            crossing = [node_R[loan.lender] != node_R[loan.borrower] for loan in planner(*batch).loans(batch.placement)]
            near, far = (near + sum(crossing), far) if planner.node_R else (near, far + sum(crossing))
    assert near < far


@LAW
@given(batches(copies=True), PLANNERS)
def test_no_rank_lends_while_a_copy_of_one_of_its_experts_has_room(batch: Batch, planner: LeastLoaded) -> None:
    placement = batch.placement
    decided = planner(*batch)
    room_R = capacity(planner, batch) - decided.load_R
    for loan in decided.loans(placement):
        for expert in placement.homed_R[loan.lender]:
            if decided.quota_RE[loan.lender, expert] > 0:
                copies = np.flatnonzero(placement.held_RE[:, expert])
                assert not (room_R[copies[copies != loan.lender]] > 0).any()


@LAW
@given(st.lists(st.integers(0, 500), min_size=2, max_size=8), HEADROOMS)
def test_experts_with_copies_everywhere_never_visit(load_E: list[int], headroom: float) -> None:
    ranks = len(load_E)
    everywhere = [(rank, expert) for rank in range(ranks) for expert in range(ranks)]
    batch = Batch(np.array([load_E] * ranks), at_homes(range(ranks), ranks, everywhere))
    planner = LeastLoaded(headroom=headroom)
    decided = planner(*batch)
    assert decided.loans(batch.placement) == ()
    assert decided.load_R.max() <= capacity(planner, batch)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"headroom": 0.99}, "headroom=0.99.*1 <= headroom"),
        ({"headroom": math.nan}, "headroom=nan.*1 <= headroom"),
        ({"headroom": math.inf}, "headroom=inf"),
        ({"headroom": 1.7e308}, "headroom=1.7e"),
        ({"min_chunk": 0}, "min_chunk=0.*at least 1"),
        ({"min_chunk": -3}, "min_chunk=-3.*at least 1"),
    ],
)
def test_a_planner_that_cannot_be_is_refused_by_the_number_given(options: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LeastLoaded(**options)  # type: ignore[arg-type]


def test_nodes_of_another_number_of_ranks_are_refused_by_both_numbers() -> None:
    planner = LeastLoaded(node_R=(0, 0, 1))
    with pytest.raises(ValueError, match=r"3 ranks.* 4"):
        planner(*HARD_BATCHES["one hot expert"])
