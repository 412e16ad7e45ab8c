"""One contract, every implementation: its tests run these on the hard batches and on their own."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest

from placement import Placement
from routing import Assigner, Assignment
from tests.routing.batches import Batch, at_homes, contiguous, zipf


def check_assigner(assigner: Assigner, batch: Batch) -> Assignment:
    """Whatever an Assigner decides, it computes each row once, in whole rows, on ranks that can get the expert, and
    decides the same again. -> what it decided, for further laws."""
    count_RE, placement = batch
    given = count_RE.tobytes()
    decided = assigner(count_RE, placement)
    quota_RE = decided.quota_RE
    assert count_RE.tobytes() == given, "the assigner wrote into the table it was given"
    assert not np.shares_memory(quota_RE, count_RE), "the quotas are a view of the table that was given"
    assert np.array_equal(decided.count_RE, count_RE), "the Assignment tells of another batch"
    assert quota_RE.dtype == np.int64, "quotas are whole rows"
    assert quota_RE.shape == count_RE.shape
    assert quota_RE.min(initial=0) >= 0, "a rank computes fewer than no rows"
    assert np.array_equal(quota_RE.sum(axis=0), count_RE.sum(axis=0)), "rows were lost or invented"

    again = copy.deepcopy(assigner)(count_RE.copy(), Placement(expert_RS=placement.expert_RS.copy()))
    assert again.quota_RE.tobytes() == quota_RE.tobytes(), "two ranks would decide differently"

    loans = decided.loans(placement)
    assert len({(loan.expert, loan.borrower) for loan in loans}) == len(loans), "an expert visits a rank twice"
    for loan in loans:
        assert placement.home_E[loan.expert] == loan.lender, "only home lends"
        assert not placement.held_RE[loan.borrower, loan.expert], "a rank borrows what it holds"
    return decided


def check_refuses_foreign_tables(assigner: Assigner) -> None:
    """A table for other ranks or other experts than the placement's is an error that names all four numbers."""
    placement = contiguous(6, 3)
    for ranks, experts in ((2, 6), (4, 6), (3, 5), (3, 7)):
        with pytest.raises(ValueError) as error:
            assigner(np.full((ranks, experts), 10, dtype=np.int64), placement)
        assert sorted(map(int, re.findall(r"\d+", str(error.value)))) == sorted([ranks, experts, 3, 6])


def _batch(count_RE: object, placement: Placement) -> Batch:
    return Batch(np.array(count_RE, dtype=np.int64), placement)


def _one_hot(expert: int, placement: Placement, rows: int = 1000) -> Batch:
    count_RE = np.zeros((placement.ranks, placement.num_experts), dtype=np.int64)
    count_RE[:, expert] = rows
    return Batch(count_RE, placement)


HARD_BATCHES: dict[str, Batch] = {
    "one rank": Batch(zipf(5, 1, 1.2, seed=0), contiguous(5, 1)),
    "one rank, one expert": _batch([[7]], contiguous(1, 1)),
    "fewer experts than ranks": Batch(zipf(3, 8, 0.8, seed=1), contiguous(3, 8)),
    "one expert, many ranks": _batch([[5], [0], [9], [2]], at_homes([2], 4)),
    "ranks do not divide experts": Batch(zipf(10, 4, 1.2, seed=2), contiguous(10, 4)),
    "ragged, rows do not divide": Batch(zipf(10, 4, 1.2, seed=3, ragged=True), contiguous(10, 4)),
    "every expert at one rank": Batch(zipf(6, 4, 0.5, seed=4), at_homes([3] * 6, 4)),
    "copies": Batch(zipf(8, 4, 1.2, seed=5), at_homes([0, 0, 1, 1, 2, 2, 3, 3], 4, [(3, 0), (2, 0), (1, 6), (0, 5)])),
    "every expert everywhere": Batch(
        zipf(4, 3, 1.2, seed=6), at_homes([0, 0, 0, 0], 3, [(r, e) for r in range(3) for e in range(4)])
    ),
    "no rows": _batch(np.zeros((4, 8)), contiguous(8, 4)),
    "a single row": _batch([[0, 0, 0], [0, 0, 1], [0, 0, 0]], contiguous(3, 3)),
    "fewer rows than ranks": _batch([[3, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4], contiguous(4, 4)),
    "one hot expert": _one_hot(0, contiguous(8, 4)),
    "one hot expert at the last rank": _one_hot(7, contiguous(8, 4)),
    "one hot expert with copies": _one_hot(1, at_homes([0, 0, 1, 1, 2, 2, 3, 3], 4, [(2, 1), (3, 1)])),
    "a rank without rows": _batch([[40, 3, 0, 1], [0, 0, 0, 0], [9, 9, 50, 0]], at_homes([0, 0, 1, 2], 3)),
    "a rank without experts": _batch([[40, 3, 0, 1], [2, 2, 2, 2], [9, 9, 50, 0]], at_homes([0, 0, 2, 2], 3)),
    "every token takes every expert": _batch([[6] * 5, [0] * 5, [11] * 5], contiguous(5, 3)),
}
