"""NearestCopy: own rank, own node, evenly; no expert moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given

from routing import AtHome, NearestCopy
from tests.contracts import HARD_BATCHES, check_assigner, check_refuses_foreign_tables
from tests.routing.batches import LAW, Batch, at_homes, batches, copied_batches

pytestmark = pytest.mark.fast
Drawn = tuple[Batch, tuple[int, ...]]


@pytest.mark.parametrize("name", HARD_BATCHES)
@pytest.mark.parametrize("nodes", [1, 2])
def test_nearest_copy_keeps_the_contract_on_hard_batches_and_lends_nothing(name: str, nodes: int) -> None:
    batch = HARD_BATCHES[name]
    node_R = tuple(rank * nodes // batch.placement.ranks for rank in range(batch.placement.ranks))
    assert check_assigner(NearestCopy(node_R=node_R), batch).loans(batch.placement) == ()


@LAW
@given(copied_batches())
def test_nearest_copy_keeps_the_contract_and_lends_nothing(drawn: Drawn) -> None:
    batch, node_R = drawn
    assert check_assigner(NearestCopy(node_R=node_R), batch).loans(batch.placement) == ()


def test_nearest_copy_refuses_a_table_for_other_ranks_or_experts() -> None:
    check_refuses_foreign_tables(NearestCopy())


@LAW
@given(copied_batches())
def test_a_row_stays_where_its_own_rank_has_a_copy(drawn: Drawn) -> None:
    batch, node_R = drawn
    decided = NearestCopy(node_R=node_R)(*batch)
    for rank, held_E in enumerate(batch.placement.held_RE):
        assert np.array_equal(decided.sent_by(rank)[rank, held_E], batch.count_RE[rank, held_E])


@LAW
@given(copied_batches())
def test_copies_on_one_node_share_the_rows_of_others_evenly(drawn: Drawn) -> None:
    batch, node_R = drawn
    held_RE, quota_RE = batch.placement.held_RE, NearestCopy(node_R=node_R)(*batch).quota_RE
    nodes = np.array(node_R or [0] * batch.placement.ranks)
    for expert in range(batch.placement.num_experts):
        taken_R = quota_RE[:, expert] - batch.count_RE[:, expert]
        for node in np.unique(nodes):
            taken = taken_R[held_RE[:, expert] & (nodes == node)]
            # One from dividing over the node, one from dividing the rows that come from nodes without a copy.
            assert not taken.size or np.ptp(taken) <= (2 if node_R else 1)


@LAW
@given(copied_batches())
def test_a_node_with_a_copy_computes_all_its_rows(drawn: Drawn) -> None:
    batch, node_R = drawn
    quota_RE, nodes = NearestCopy(node_R=node_R)(*batch).quota_RE, np.array(node_R or [0] * batch.placement.ranks)
    for node in np.unique(nodes):
        here_E = batch.placement.held_RE[nodes == node].any(axis=0)
        computed_E, routed_E = quota_RE[nodes == node].sum(axis=0), batch.count_RE[nodes == node].sum(axis=0)
        assert (computed_E >= routed_E)[here_E].all()


@LAW
@given(copied_batches())
def test_no_row_crosses_nodes_that_are_blocks_of_ranks_with_a_copy_each(drawn: Drawn) -> None:
    batch, node_R = drawn
    assume(node_R == tuple(sorted(node_R)) and len(set(node_R)) > 1)
    nodes = np.array(node_R)
    flow_RRE = NearestCopy(node_R=node_R)(*batch).flow_RRE()
    everywhere_E = np.all([batch.placement.held_RE[nodes == node].any(axis=0) for node in np.unique(nodes)], axis=0)
    assert not flow_RRE[nodes[:, None] != nodes][:, everywhere_E].any()


def test_rows_without_a_copy_on_their_node_are_shared_by_all_copies() -> None:
    """Expert 0 lives on ranks 0 and 2, on a node each; node 2 has none, and its 10 rows go to both."""
    placement = at_homes([0, 4], 6, [(2, 0)])
    count_RE = np.zeros((6, 2), dtype=np.int64)
    count_RE[:, 0] = [3, 4, 1, 1, 5, 5]
    quota_RE = NearestCopy(node_R=(0, 0, 1, 1, 2, 2))(count_RE, placement).quota_RE
    assert quota_RE[:, 0].tolist() == [7 + 5, 0, 2 + 5, 0, 0, 0]


def test_rows_that_do_not_divide_do_not_pile_up_on_the_first_rank() -> None:
    """Four experts with copies on both ranks 0 and 1, and a row each from rank 2: two rows each."""
    placement = at_homes([0] * 4, 3, [(1, expert) for expert in range(4)])
    count_RE = np.array([[0] * 4, [0] * 4, [1] * 4])
    assert NearestCopy()(count_RE, placement).load_R.tolist() == [2, 2, 0]


@LAW
@given(batches(copies=False))
def test_without_copies_nearest_copy_is_at_home(batch: Batch) -> None:
    assert NearestCopy()(*batch).quota_RE.tobytes() == AtHome()(*batch).quota_RE.tobytes()


def test_nodes_of_another_number_of_ranks_are_refused_by_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 ranks.* 4"):
        NearestCopy(node_R=(0, 0, 1))(*HARD_BATCHES["copies"])
