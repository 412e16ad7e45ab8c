"""Assignment: rows flow as if they were moved one by one, and tables that lose rows are refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from placement import Placement
from routing import Assignment, Loan
from tests.routing.batches import LAW, at_homes, contiguous, placements, scattered

pytestmark = pytest.mark.fast
Table = NDArray[np.int64]


@st.composite
def assignments(draw: st.DrawFn, placement: Placement | None = None) -> Assignment:
    """Any two tables with the same column sums; half of the time most rows stay where they are."""
    ranks = placement.ranks if placement else draw(st.integers(1, 5))
    experts = placement.num_experts if placement else draw(st.integers(1, 4))
    load_E = draw(st.lists(st.integers(0, 12), min_size=experts, max_size=experts))
    count_RE = scattered(load_E, ranks, draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        return Assignment(count_RE=count_RE, quota_RE=scattered(load_E, ranks, draw(st.integers(0, 2**16))))
    quota_RE = count_RE.copy()
    for expert in range(experts):
        source, destination = draw(st.tuples(st.integers(0, ranks - 1), st.integers(0, ranks - 1)))
        moved = draw(st.integers(0, int(quota_RE[source, expert])))
        quota_RE[source, expert] -= moved
        quota_RE[destination, expert] += moved
    return Assignment(count_RE=count_RE, quota_RE=quota_RE)


def flow_row_by_row(count_RE: Table, quota_RE: Table) -> Table:
    """The definition, literally: a rank keeps its own rows while its quota lasts; the rest queue up in source order and
    each takes the first rank that still has some quota left."""
    ranks, experts = count_RE.shape
    flow_RRE = np.zeros((ranks, ranks, experts), dtype=np.int64)
    for expert in range(experts):
        left_R = quota_RE[:, expert].tolist()
        queue = []
        for source in range(ranks):
            for _ in range(count_RE[source, expert]):
                if left_R[source] > 0:
                    left_R[source] -= 1
                    flow_RRE[source, source, expert] += 1
                else:
                    queue.append(source)
        for source in queue:
            destination = next(rank for rank in range(ranks) if left_R[rank] > 0)
            left_R[destination] -= 1
            flow_RRE[source, destination, expert] += 1
    return flow_RRE


@LAW
@given(assignments())
def test_rows_flow_as_if_they_were_moved_one_by_one(assignment: Assignment) -> None:
    assert np.array_equal(assignment.flow_RRE(), flow_row_by_row(assignment.count_RE, assignment.quota_RE))


@LAW
@given(assignments())
def test_every_routed_row_leaves_once_and_every_quota_is_filled(assignment: Assignment) -> None:
    flow_RRE = assignment.flow_RRE()
    assert flow_RRE.min() >= 0
    assert np.array_equal(flow_RRE.sum(axis=1), assignment.count_RE)
    assert np.array_equal(flow_RRE.sum(axis=0), assignment.quota_RE)
    assert np.array_equal(flow_RRE.sum(axis=(0, 2)), assignment.load_R)


@LAW
@given(assignments())
def test_what_a_rank_sends_and_receives_are_slices_of_the_flow(assignment: Assignment) -> None:
    flow_RRE = assignment.flow_RRE()
    for rank in range(len(flow_RRE)):
        assert np.array_equal(assignment.sent_by(rank), flow_RRE[rank])
        assert np.array_equal(assignment.received_by(rank), flow_RRE[:, rank])


@LAW
@given(assignments())
def test_as_many_rows_as_can_stay_do_stay(assignment: Assignment) -> None:
    for rank, flow_RE in enumerate(assignment.flow_RRE()):
        assert np.array_equal(flow_RE[rank], np.minimum(assignment.count_RE[rank], assignment.quota_RE[rank]))


@LAW
@given(assignments())
def test_reading_the_flow_leaves_the_tables_alone(assignment: Assignment) -> None:
    before = assignment.count_RE.tobytes(), assignment.quota_RE.tobytes()
    assignment.flow_RRE()
    assert (assignment.count_RE.tobytes(), assignment.quota_RE.tobytes()) == before


@LAW
@given(st.data())
def test_an_expert_is_lent_exactly_where_its_rows_are_computed_without_a_copy(data: st.DataObject) -> None:
    placement = data.draw(placements())
    assignment = data.draw(assignments(placement))
    expected = []
    for rank in range(placement.ranks):
        for expert in range(placement.num_experts):
            if assignment.quota_RE[rank, expert] > 0 and expert not in placement.expert_RS[rank]:
                home = min(r for r in range(placement.ranks) if expert in placement.expert_RS[r])
                expected.append(Loan(expert=expert, lender=home, borrower=rank))
    assert assignment.loans(placement) == tuple(expected)


def test_a_copy_makes_a_loan_unnecessary() -> None:
    count_RE = np.array([[8, 0], [0, 4]])
    split = Assignment(count_RE=count_RE, quota_RE=np.array([[6, 0], [2, 4]]))
    assert split.loans(contiguous(2, 2)) == (Loan(expert=0, lender=0, borrower=1),)
    assert split.loans(at_homes([0, 1], 2, [(1, 0)])) == ()


@LAW
@given(assignments(), st.data())
def test_a_table_that_loses_or_invents_rows_is_refused_by_expert_and_both_numbers(
    assignment: Assignment, data: st.DataObject
) -> None:
    ranks, experts = assignment.count_RE.shape
    rank, expert = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(0, experts - 1))
    quota_RE = assignment.quota_RE.copy()
    quota_RE[rank, expert] += data.draw(st.integers(-int(quota_RE[rank, expert]), 9).filter(bool))
    with pytest.raises(ValueError) as error:
        Assignment(count_RE=assignment.count_RE, quota_RE=quota_RE)
    routed, assigned = assignment.count_RE[:, expert].sum(), quota_RE[:, expert].sum()
    assert f"expert {expert} " in str(error.value)
    assert re.findall(r"(?:routed|assigned) (\d+)", str(error.value)) == [str(routed), str(assigned)]


@LAW
@given(assignments(), st.data())
def test_rows_that_only_changed_their_expert_are_refused_too(assignment: Assignment, data: st.DataObject) -> None:
    """The total is right; the law holds expert by expert."""
    experts = assignment.count_RE.shape[1]
    lost = np.argwhere(assignment.quota_RE > 0).tolist()
    if experts == 1 or not lost:
        return
    rank, expert = data.draw(st.sampled_from(lost))
    quota_RE = assignment.quota_RE.copy()
    quota_RE[rank, expert] -= 1
    quota_RE[rank, (expert + 1) % experts] += 1
    with pytest.raises(ValueError, match=f"expert {min(expert, (expert + 1) % experts)} "):
        Assignment(count_RE=assignment.count_RE, quota_RE=quota_RE)


@pytest.mark.parametrize(
    ("count_RE", "quota_RE"),
    [([[2], [0]], [[3], [-1]]), ([[3], [-1]], [[2], [0]])],
    ids=["negative quota", "negative count"],
)
def test_a_negative_number_of_rows_is_refused_though_the_sums_agree(
    count_RE: list[list[int]], quota_RE: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        Assignment(count_RE=np.array(count_RE), quota_RE=np.array(quota_RE))


@pytest.mark.parametrize(("shape", "other"), [((2, 3), (3, 2)), ((2, 3), (2, 4)), ((4,), (4,)), ((1, 2, 2), (1, 2, 2))])
def test_tables_of_other_shapes_are_refused_by_both_shapes(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {shape} and {other}")):
        Assignment(count_RE=np.zeros(shape, dtype=np.int64), quota_RE=np.zeros(other, dtype=np.int64))


def test_whole_rows_only() -> None:
    half = np.full((2, 1), 0.5)
    with pytest.raises(ValueError, match="whole"):
        Assignment(count_RE=half, quota_RE=half)  # type: ignore[arg-type]
