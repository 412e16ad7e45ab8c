"""Threshold: a token takes the experts whose score is above their price, and no token depends on another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routing import NOWHERE, Router, Sigmoid, Threshold, Tokens, Weigh
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
TOKENS = Tokens(None, 0)


@LAW
@given(st.integers(1, 8), st.integers(0, 8), st.floats(-1.5, 1.5), st.integers(0, 2**16))
def test_a_token_takes_its_best_experts_above_the_price(num_experts: int, fewer: int, shift: float, seed: int) -> None:
    most = max(1, num_experts - fewer)
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randn(9, num_experts, generator=generator, dtype=torch.float64) + shift
    price_E = torch.randn(num_experts, generator=generator)
    priced_TE = score_TE - price_E
    rows = Threshold(most=most)(score_TE, price_E, 1, TOKENS)
    assert rows.top_k == most
    assert rows.token_N.tolist() == [token for token in range(9) for _ in range(most)]
    for priced_E, picks in zip(priced_TE.tolist(), rows.expert_N.view(9, most).tolist()):
        best = sorted(range(num_experts), key=lambda expert: -priced_E[expert])[:most]
        assert picks == [expert if priced_E[expert] > 0 else NOWHERE for expert in best]


def test_a_score_that_equals_its_price_is_not_above_it() -> None:
    assert Threshold(most=2)(torch.tensor([[0.5, 1e-30]]), torch.tensor([0.5, 0.0]), 1, TOKENS).expert_N.tolist() == [
        1,
        NOWHERE,
    ]


def test_experts_not_above_their_price_have_no_weight_and_no_load() -> None:
    torch.manual_seed(0)
    router = Router(8, 6, 2, score=Sigmoid(), select=Threshold(most=4), weigh=Weigh(normalize=True))
    router.price_E.fill_(0.5)
    choice = router(torch.randn(50, 8))
    chosen_TK = choice.expert_TK != NOWHERE
    assert (choice.weight_N.view(50, 4)[~chosen_TK] == 0).all()
    assert int(choice.load_E.sum()) == int(chosen_TK.sum()) < 200
    assert (choice.score_TE[choice.token_N, choice.expert_N][chosen_TK.flatten()] > 0.5).all()
    total_T = choice.weight_N.view(50, 4).sum(dim=1)
    torch.testing.assert_close(total_T, chosen_TK.any(dim=1).float())


def test_what_a_token_takes_depends_on_no_other_token() -> None:
    torch.manual_seed(0)
    router, x_TD = Router(8, 6, 2, select=Threshold(most=3), dtype=torch.float64), torch.randn(20, 8).double()
    router.price_E.copy_(torch.rand(6) / 4)
    whole = router(x_TD).expert_TK
    assert torch.equal(router(x_TD[5:9]).expert_TK, whole[5:9])


@pytest.mark.parametrize(("num_experts", "top_k", "most"), [(8, 3, 2), (4, 2, 5), (8, 0, 2)])
def test_a_threshold_that_cannot_be_is_refused(num_experts: int, top_k: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k} on average and at most {most} of {num_experts}"):
        Router(4, num_experts, top_k, select=Threshold(most=most))


def test_no_experts_at_most_is_refused() -> None:
    with pytest.raises(ValueError, match="most=0"):
        Threshold(most=0)
