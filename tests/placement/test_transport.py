from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.transport import transport

pytestmark = pytest.mark.fast


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_assignment_within_the_room_gains_more(seed: int, items: int, ranks: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    gain_BNR = (
        random.integers(-3, 4, (3, items, ranks)).astype(float) if ties else random.normal(size=(3, items, ranks))
    )
    room_R = random.integers(0, items + 1, ranks)
    room_R[0] += max(items - room_R.sum(), 0)
    rank_BN = transport(gain_BNR, room_R.tolist())
    for gain_NR, rank_N in zip(gain_BNR, rank_BN, strict=True):
        assert (np.bincount(rank_N, minlength=ranks) <= room_R).all()
        best = max(
            sum(gain_NR[n, r] for n, r in enumerate(ranks_N))
            for ranks_N in itertools.product(range(ranks), repeat=items)
            if (np.bincount(ranks_N, minlength=ranks) <= room_R).all()
        )
        assert gain_NR[np.arange(items), rank_N].sum() == pytest.approx(best, abs=1e-9)


def test_items_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 items do not fit ranks with room for \[1, 1\]"):
        transport(np.zeros((1, 3, 2)), [1, 1])
