"""Cutoff: a price that a share K / E of the tokens exceeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routing.cutoff import Cutoff
from tests.routing.batches import LAW
from tests.routing.scored import choose, drifting, observed, popular, quoted, unlike

pytestmark = pytest.mark.fast


def settle(balancer: Cutoff, scores: list[Tensor], price_E: Tensor, top_k: int, settled: int) -> Tensor:
    choices = [choose(score_TE, price_E, top_k) for score_TE in scores]
    return balancer.settle(price_E, observed(balancer, choices, price_E), top_k, settled=torch.tensor(settled))


@settings(LAW, max_examples=50)
@given(st.integers(0, 2**16), st.integers(1, 60), st.integers(2, 9), st.data())
def test_before_any_settling_exactly_a_share_of_the_batch_exceeds_its_price(
    seed: int, num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts - 1))
    score_TE = popular(num_tokens, num_experts, seed, "sigmoid")
    price_E = quoted(Cutoff(), score_TE, top_k, torch.full((num_experts,), 0.7))
    assert ((score_TE > price_E).sum(dim=0) == num_tokens * top_k // num_experts).all()


def test_once_settled_the_standing_prices_are_quoted() -> None:
    price_E = torch.linspace(0, 1, 16)
    for settled in (1, 100):
        quoted_E = Cutoff().quote(popular(64, 16), price_E, 4, valid_T=None, settled=torch.tensor(settled))
        assert torch.equal(quoted_E, price_E.to(quoted_E.dtype))


def test_the_first_settling_replaces_and_the_next_average() -> None:
    score_TE, price_E = popular(4096, 16, score="sigmoid"), torch.full((16,), 0.4)
    own_E = quoted(Cutoff(), score_TE, 4).float()
    torch.testing.assert_close(settle(Cutoff(), [score_TE], price_E, 4, 0), own_E, rtol=0, atol=0.01)
    torch.testing.assert_close(
        settle(Cutoff(), [score_TE], price_E, 4, 1), 0.9 * price_E + 0.1 * own_E, rtol=0, atol=0.001
    )


def test_it_comes_to_rest_at_the_quantile_of_all_tokens() -> None:
    """Of unlike micro-batches too, where the mean of their quantiles is not the quantile."""
    scores, price_E = unlike(), torch.zeros(16)
    for settled in range(80):
        price_E = settle(Cutoff(), scores, price_E, 2, settled)
    load_E = (torch.cat(scores) > price_E).sum(dim=0)
    assert (load_E - 512).abs().max() <= 1
    means_E = torch.stack([quoted(Cutoff(), score_TE, 2) for score_TE in scores]).mean(dim=0)
    assert ((torch.cat(scores) > means_E).sum(dim=0) - 512).abs().max() > 50


def test_the_same_to_the_bit_however_tokens_are_spread() -> None:
    score_TE, price_E = torch.cat(unlike()).float(), torch.linspace(0.3, 0.7, 16)
    whole_E = settle(Cutoff(), [score_TE], price_E, 2, 3)
    for parts in (score_TE.chunk(8), score_TE.flip(0).split(3)):
        assert torch.equal(settle(Cutoff(), list(parts), price_E, 2, 3), whole_E)


def test_every_token_takes_k_on_average_while_the_scores_drift() -> None:
    price_E, taken = torch.zeros(16), []
    for settled, score_TE in enumerate(drifting(16, 2048, 60, "sigmoid")):
        quoted_E = Cutoff().quote(score_TE, price_E, 4, valid_T=None, settled=torch.tensor(settled))
        taken.append(float((score_TE > quoted_E).sum() / 2048))
        price_E = settle(Cutoff(), [score_TE], price_E, 4, settled)
    assert taken[0] == pytest.approx(4.0)
    assert all(3.5 < each < 4.5 for each in taken)
