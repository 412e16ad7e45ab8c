"""AtHome, and the contract itself: it must notice what it forbids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from placement import Placement
from routing import Assignment, AtHome
from tests.contracts import HARD_BATCHES, check_assigner, check_refuses_foreign_tables
from tests.routing.batches import LAW, Batch, batches, contiguous

pytestmark = pytest.mark.fast
Table = NDArray[np.int64]


@pytest.mark.parametrize("name", HARD_BATCHES)
def test_at_home_keeps_the_contract_on_hard_batches(name: str) -> None:
    check_assigner(AtHome(), HARD_BATCHES[name])


@LAW
@given(batches())
def test_at_home_computes_every_row_at_its_experts_home_and_lends_nothing(batch: Batch) -> None:
    decided = check_assigner(AtHome(), batch)
    for expert, load in enumerate(batch.load_E):
        home = min(rank for rank in range(batch.placement.ranks) if batch.placement.held_RE[rank, expert])
        assert decided.quota_RE[home, expert] == load
    assert decided.loans(batch.placement) == ()
    assert np.array_equal(decided.load_R, batch.home_R)


def test_at_home_refuses_a_table_for_other_ranks_or_experts() -> None:
    check_refuses_foreign_tables(AtHome())


def _writes(count_RE: Table, placement: Placement) -> Assignment:
    count_RE[0] += 1
    return AtHome()(count_RE, placement)


def _aliases(count_RE: Table, placement: Placement) -> Assignment:
    return Assignment(count_RE=count_RE, quota_RE=count_RE)


def _narrow(count_RE: Table, placement: Placement) -> Assignment:
    return Assignment(count_RE=count_RE, quota_RE=np.roll(count_RE, 1, axis=0).astype(np.int32))  # type: ignore[arg-type]


def _forgets(count_RE: Table, placement: Placement) -> Assignment:
    return AtHome()(np.zeros_like(count_RE), placement)


class _Drifts:
    """Another answer on the second call of the same process, though a fresh process would agree."""

    calls: int = 0

    def __call__(self, count_RE: Table, placement: Placement) -> Assignment:
        _Drifts.calls += 1
        return Assignment(count_RE=count_RE, quota_RE=np.roll(count_RE, _Drifts.calls, axis=0))


@pytest.mark.parametrize("broken", [_writes, _aliases, _narrow, _forgets, _Drifts()])
def test_the_contract_notices_a_broken_assigner(broken: Callable[[Table, Placement], Assignment]) -> None:
    batch = Batch(np.array([[1, 2], [3, 5], [0, 7]], dtype=np.int64), contiguous(2, 3))
    with pytest.raises(AssertionError):
        check_assigner(broken, batch)
