"""Sinkhorn: balanced in fractions, and for one expert a token near the dual's best prices."""

from __future__ import annotations

import pytest
import torch

from routing.dual import dual_gap
from routing.sinkhorn import Sinkhorn
from tests.routing.scored import choose, max_violation, popular, quoted, step

pytestmark = pytest.mark.fast


def test_what_it_spreads_over_the_experts_is_balanced() -> None:
    """exp((score - p - q) / temperature), p from the last prices, sums to K for each token and to C for each expert."""
    score_TE, heat = popular(512, 16), 0.1
    price_E = quoted(Sinkhorn(temperature=heat, rounds=200), score_TE, 4)
    share_TE = 4 * ((score_TE - price_E) / heat).softmax(dim=1)
    torch.testing.assert_close(share_TE.sum(dim=0), torch.full((16,), 128.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("top_k, best, optimum", [(1, 0.01, 118.534078), (4, 0.2, 298.083265)])
def test_for_one_expert_a_token_cooler_is_better_and_for_more_it_is_not(
    top_k: int, best: float, optimum: float
) -> None:
    score_TE = popular(512, 16)
    gap = {}
    for heat in (1.0, 0.2, 0.05, 0.01):
        price_E = quoted(Sinkhorn(temperature=heat, rounds=300), score_TE, top_k)
        gap[heat] = float(dual_gap(score_TE, price_E, top_k, kept=optimum))
    assert min(gap, key=lambda heat: gap[heat]) == best
    assert gap[best] < 1e-3
    coldest_E = quoted(Sinkhorn(temperature=0.01, rounds=300), score_TE, top_k)
    assert (max_violation(choose(score_TE, coldest_E, top_k)) < 0.1) == (top_k == 1)


def test_it_goes_on_from_where_it_stands() -> None:
    """Ten steps of one round are ten rounds."""
    score_TE, price_E = popular(512, 16), torch.zeros(16)
    for settled in range(10):
        price_E, _ = step(Sinkhorn(rounds=1), [score_TE], price_E, 4, settled)
    torch.testing.assert_close(price_E, quoted(Sinkhorn(rounds=10), score_TE, 4).float(), rtol=1e-4, atol=1e-6)
    assert price_E.mean().abs() < 1e-6
