"""BreakEven: what a visit costs is a number from the machine, and a plan that does not earn it is not made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from routing import AtHome, BreakEven, LeastLoaded
from tests.contracts import check_assigner
from tests.routing.batches import LAW, Batch, batches, contiguous, zipf

pytestmark = pytest.mark.fast

PLANNERS = st.builds(LeastLoaded, headroom=st.sampled_from([1.0, 1.05, 1.3]), min_chunk=st.sampled_from([1, 1, 5, 100]))


@LAW
@given(
    flops=st.floats(1e9, 1e16),
    bandwidth=st.floats(1e6, 1e13),
    bytes_per_weight=st.sampled_from([1, 2, 4]),
    weights=st.integers(1, 10**9),
)
def test_a_visit_costs_the_rows_computed_while_it_moves_whatever_its_size(
    flops: float, bandwidth: float, bytes_per_weight: int, weights: int
) -> None:
    seconds_to_move = weights * bytes_per_weight / bandwidth
    seconds_a_row = 2 * weights / flops
    cost = BreakEven.of(flops=flops, bandwidth=bandwidth, bytes_per_weight=bytes_per_weight).rows
    assert cost == pytest.approx(seconds_to_move / seconds_a_row, rel=1e-12)
    assert cost == pytest.approx(bytes_per_weight * flops / (2 * bandwidth), rel=1e-12)


@pytest.mark.parametrize(("bandwidth", "rows"), [(400e9, 1750), (50e9, 14000)], ids=["NVLink", "InfiniBand"])
def test_the_documented_costs_are_what_the_formula_gives(bandwidth: float, rows: float) -> None:
    assert BreakEven.of(flops=700e12, bandwidth=bandwidth) == BreakEven(rows=rows)


@LAW
@given(st.integers(0, 10_000), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_a_plan_pays_if_its_relief_exceeds_the_visits_of_the_busiest_link(
    rows: int, visits: list[tuple[int, int]]
) -> None:
    visits = [(lender, borrower) for lender, borrower in visits if lender != borrower]
    most = max((sum(rank in visit for visit in visits) for rank in range(6)), default=0)
    assert not BreakEven(rows=rows)(rows * most, visits)
    assert BreakEven(rows=rows)(rows * most + 1, visits)


@dataclass(frozen=True)
class Witness:
    """A policy that writes down what it was asked."""

    asked: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)
    answer: bool = True

    def __call__(self, relief: int, visits: Sequence[tuple[int, int]]) -> bool:
        self.asked.append((relief, list(visits)))
        return self.answer


@LAW
@given(batches(), PLANNERS)
def test_the_policy_is_told_the_true_relief_and_every_visit(batch: Batch, planner: LeastLoaded) -> None:
    witness = Witness()
    decided = replace(planner, worth=witness)(*batch)
    loans = decided.loans(batch.placement)
    if not witness.asked:
        assert np.array_equal(decided.quota_RE, AtHome()(*batch).quota_RE)
        return
    [(relief, visits)] = witness.asked
    assert relief == batch.home_R.max() - decided.load_R.max()
    assert sorted(visits) == sorted((loan.lender, loan.borrower) for loan in loans)


@LAW
@given(batches(), PLANNERS)
def test_a_refused_plan_leaves_every_row_at_home_to_the_bit(batch: Batch, planner: LeastLoaded) -> None:
    decided = check_assigner(replace(planner, worth=Witness(answer=False)), batch)
    assert decided.quota_RE.tobytes() == AtHome()(*batch).quota_RE.tobytes()


@LAW
@given(batches(), PLANNERS)
def test_a_plan_is_made_if_and_only_if_it_earns_its_visits(batch: Batch, planner: LeastLoaded) -> None:
    at_home, free = AtHome()(*batch), replace(planner, worth=Witness())(*batch)
    loans = free.loans(batch.placement)
    relief = int(at_home.load_R.max() - free.load_R.max())
    assume(loans and relief > 0)
    most = max(Counter(rank for loan in loans for rank in (loan.lender, loan.borrower)).values())
    dear = BreakEven(rows=math.nextafter(relief / most, math.inf))
    cheap = BreakEven(rows=relief / most * (1 - 1e-9))
    assert replace(planner, worth=dear)(*batch).quota_RE.tobytes() == at_home.quota_RE.tobytes()
    assert replace(planner, worth=cheap)(*batch).quota_RE.tobytes() == free.quota_RE.tobytes()


@LAW
@given(batches(), PLANNERS)
def test_a_plan_never_makes_the_busiest_rank_busier(batch: Batch, planner: LeastLoaded) -> None:
    assert planner(*batch).load_R.max() <= batch.home_R.max()


def test_a_slow_link_stops_loans_that_a_fast_link_makes() -> None:
    batch = Batch(zipf(32, 8, 0.8, seed=0, rows=40_000), contiguous(32, 8))
    fast, slow = (
        LeastLoaded(worth=BreakEven.of(flops=700e12, bandwidth=bandwidth))(*batch).loans(batch.placement)
        for bandwidth in (4e12, 5e9)
    )
    assert fast
    assert not slow


@pytest.mark.parametrize("rows", [-1.0, -1e-9, math.nan])
def test_a_visit_of_no_possible_cost_is_refused_by_its_number(rows: float) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows; use rows >= 0"):
        BreakEven(rows=rows)


@pytest.mark.parametrize(
    "machine",
    [{"flops": 1e12, "bandwidth": 0.0}, {"flops": -1.0, "bandwidth": 1e9}, {"flops": 1e12, "bandwidth": -1.0}],
)
def test_a_machine_that_cannot_be_is_refused(machine: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        BreakEven.of(**machine)  # type: ignore[arg-type]
