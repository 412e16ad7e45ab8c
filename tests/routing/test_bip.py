"""Bip: balance of the batch itself, from the first batch to the last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from routing.bip import Bip
from tests.routing.scored import (
    NO_STEPS,
    choose,
    drifting,
    max_violation,
    observed,
    popular,
    quoted,
    step,
    violations,
)


@pytest.mark.fast
@pytest.mark.parametrize("rounds, expected", [(0, 1.703125), (4, 0.1953125), (14, 0.0234375)])
def test_more_rounds_balance_better(rounds: int, expected: float) -> None:
    score_TE = popular(512, 16)
    assert max_violation(choose(score_TE, quoted(Bip(rounds=rounds), score_TE, 4), 4)) == expected


def by_sorting(score_TE: Tensor, price_E: Tensor, top_k: int, rounds: int) -> Tensor:
    """The definition."""
    capacity = len(score_TE) * top_k // score_TE.shape[1]
    for _ in range(rounds):
        token_price_T = (score_TE - price_E).sort(dim=1, descending=True).values[:, top_k].clamp(min=0)
        price_E = (score_TE - token_price_T[:, None]).sort(dim=0, descending=True).values[capacity].clamp(min=0)
    return price_E


@pytest.mark.fast
def test_its_prices_are_the_definitions() -> None:
    for seed, (num_tokens, num_experts, top_k) in enumerate([(96, 12, 3), (97, 12, 5), (5, 8, 1)]):
        score_TE = popular(num_tokens, num_experts, seed)
        price_E = torch.linspace(0.0, 0.05, num_experts)
        expected_E = by_sorting(score_TE, price_E.double(), top_k, 3)
        assert torch.equal(quoted(Bip(rounds=3), score_TE, top_k, price_E), expected_E)
        valid_T = torch.arange(num_tokens) % 3 > 0
        expected_E = by_sorting(score_TE[valid_T], price_E.double(), top_k, 3)
        assert torch.equal(quoted(Bip(rounds=3), score_TE, top_k, price_E, valid_T), expected_E)


@pytest.mark.fast
def test_a_shift_of_the_standing_prices_is_nothing_to_a_gauged_quote() -> None:
    score_TE, price_E = popular(512, 16), torch.linspace(0, 0.1, 16)
    gauged, free = ([quoted(each, score_TE, 4, price_E + by) for by in (0, 3)] for each in (Bip(), Bip(gauge="none")))
    torch.testing.assert_close(*gauged, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(*free, rtol=1e-2)


@pytest.mark.fast
def test_it_stands_on_the_mean_of_its_quotes_each_token_counting_once() -> None:
    scores, price_E = [popular(64, 8, 0), popular(192, 8, 1)], torch.zeros(8)
    quotes = [quoted(Bip(), score_TE, 2, price_E) for score_TE in scores]
    settled_E, _ = step(Bip(), scores, price_E, 2)
    mean_E = (quotes[0] + 3 * quotes[1]) / 4
    torch.testing.assert_close(settled_E, (mean_E - mean_E.min()).float())
    ungauged_E, _ = step(Bip(gauge="none"), scores, price_E, 2)
    torch.testing.assert_close(ungauged_E, mean_E.float())


@pytest.mark.fast
def test_padding_does_not_weigh_in_the_mean() -> None:
    score_TE, valid_T, price_E = popular(64, 8), torch.arange(64) < 16, torch.zeros(8)
    choices = [
        choose(score_TE, torch.full((8,), 1.0), 2, valid_T),
        choose(score_TE[:48], torch.arange(8.0), 2),
    ]
    settled_E = Bip().settle(price_E, observed(Bip(), choices, price_E), 2, settled=NO_STEPS)
    torch.testing.assert_close(settled_E, 0.75 * torch.arange(8.0))


def test_without_the_gauge_it_gets_worse_batch_by_batch_and_with_it_does_not() -> None:
    seen = {}
    for gauge in ("min", "none"):
        seen[gauge] = violations(Bip(gauge=gauge), drifting(16, 4096, 80, drift=0.0), 16, 4)
    assert seen["min"][-1] <= 0.05
    assert seen["none"][-1] > 0.2
