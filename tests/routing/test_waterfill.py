"""Waterfill: no split over the copies has a lower peak, and nothing moves that need not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from routing import AtHome, NearestCopy, Waterfill
from tests.contracts import HARD_BATCHES, check_assigner, check_refuses_foreign_tables
from tests.routing.batches import LAW, Batch, at_homes, batches, copied_batches, zipf
from tests.routing.peak import peak_by_programme, peak_by_trying

pytestmark = pytest.mark.fast
Drawn = tuple[Batch, tuple[int, ...]]


@pytest.mark.parametrize("name", HARD_BATCHES)
@pytest.mark.parametrize("nodes", [1, 2])
def test_waterfill_keeps_the_contract_on_hard_batches_and_lends_nothing(name: str, nodes: int) -> None:
    batch = HARD_BATCHES[name]
    node_R = tuple(rank * nodes // batch.placement.ranks for rank in range(batch.placement.ranks))
    decided = check_assigner(Waterfill(node_R=node_R), batch)
    assert decided.loans(batch.placement) == ()
    assert decided.load_R.max() == peak_by_trying(batch.load_E, batch.placement.held_RE)


@LAW
@given(copied_batches())
def test_waterfill_keeps_the_contract_and_lends_nothing(drawn: Drawn) -> None:
    batch, node_R = drawn
    assert check_assigner(Waterfill(node_R=node_R), batch).loans(batch.placement) == ()


def test_waterfill_refuses_a_table_for_other_ranks_or_experts() -> None:
    check_refuses_foreign_tables(Waterfill())


@settings(LAW, max_examples=400)
@given(copied_batches(max_ranks=6))
def test_the_peak_is_the_least_of_all_splits_in_whole_rows(drawn: Drawn) -> None:
    batch, node_R = drawn
    peak = Waterfill(node_R=node_R)(*batch).load_R.max()
    assert peak == peak_by_trying(batch.load_E, batch.placement.held_RE)


@settings(LAW, max_examples=40)
@given(copied_batches())
def test_the_peak_is_the_linear_programmes_rounded_up(drawn: Drawn) -> None:
    batch, node_R = drawn
    least = peak_by_programme(batch.load_E, batch.placement.held_RE)
    assert 0 <= Waterfill(node_R=node_R)(*batch).load_R.max() - (least - 1e-6) < 1 + 1e-6


@pytest.mark.parametrize("copies", [16, 64, 192])
def test_the_peak_is_the_linear_programmes_at_64_ranks_and_256_experts(copies: int) -> None:
    rng = np.random.default_rng(copies)
    extra = np.stack([rng.integers(0, 64, copies), rng.integers(0, 64, copies)], axis=1)
    placement = at_homes(rng.permutation(np.arange(256) % 64).tolist(), 64, extra.tolist())
    count_RE = zipf(256, 64, 0.3, copies)
    least = peak_by_programme(count_RE.sum(axis=0), placement.held_RE)
    assert 0 <= Waterfill()(count_RE, placement).load_R.max() - (least - 1e-6) < 1 + 1e-6


def test_rows_reach_a_distant_rank_by_a_chain_of_copies() -> None:
    """Each expert lives on two neighbours. Only by passing rows on along the whole line do all ranks come out even."""
    placement = at_homes(range(7), 8, [(rank + 1, rank) for rank in range(7)])
    count_RE = np.zeros((8, 7), dtype=np.int64)
    count_RE[0] = [200, 100, 100, 100, 100, 100, 100]
    assert Waterfill()(count_RE, placement).load_R.tolist() == [100] * 8


@LAW
@given(copied_batches())
def test_the_peak_is_never_above_nearest_copys_or_at_homes(drawn: Drawn) -> None:
    batch, node_R = drawn
    peak = Waterfill(node_R=node_R)(*batch).load_R.max()
    assert peak <= NearestCopy(node_R=node_R)(*batch).load_R.max()
    assert peak <= AtHome()(*batch).load_R.max()


@settings(LAW, max_examples=300)
@given(copied_batches())
def test_only_ranks_above_the_peak_give_and_only_to_the_peak(drawn: Drawn) -> None:
    batch, node_R = drawn
    before_R = NearestCopy(node_R=node_R)(*batch).load_R
    after_R = Waterfill(node_R=node_R)(*batch).load_R
    peak = peak_by_trying(batch.load_E, batch.placement.held_RE)
    assert (after_R >= np.minimum(before_R, peak)).all()


@LAW
@given(copied_batches())
def test_where_nearest_copy_has_the_least_peak_waterfill_is_nearest_copy(drawn: Drawn) -> None:
    batch, node_R = drawn
    nearest = NearestCopy(node_R=node_R)(*batch)
    if nearest.load_R.max() == peak_by_trying(batch.load_E, batch.placement.held_RE):
        assert Waterfill(node_R=node_R)(*batch).quota_RE.tobytes() == nearest.quota_RE.tobytes()


def test_a_copy_on_the_givers_node_takes_rows_before_one_elsewhere() -> None:
    """Expert 0 lives on ranks 0, 2 and 3; expert 1 makes rank 0 too busy. Either of 2 and 3 has room for its rows."""
    placement = at_homes([0, 0, 1], 4, [(2, 0), (3, 0)])
    count_RE = np.array([[60, 90, 0], [0, 0, 100], [0, 0, 0], [0, 0, 0]])
    for node_R in ((0, 1, 1, 0), (0, 1, 0, 1)):
        quota_RE = Waterfill(node_R=node_R)(count_RE, placement).quota_RE
        near = node_R.index(0, 1)
        assert quota_RE[near, 0] == 50
        assert quota_RE[5 - near, 0] == 0


@LAW
@given(batches(copies=False))
def test_without_copies_waterfill_is_at_home(batch: Batch) -> None:
    assert Waterfill()(*batch).quota_RE.tobytes() == AtHome()(*batch).quota_RE.tobytes()


def test_nodes_of_another_number_of_ranks_are_refused_by_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 ranks.* 4"):
        Waterfill(node_R=(0, 0, 1))(*HARD_BATCHES["copies"])
