"""Balancing losses cost each token what its scores and the loads make of it; balance costs the coefficient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing import NOWHERE, Choice, GlobalLoss, GShardLoss, Loss, SequenceLoss, SwitchLoss, ZLoss
from tests.routing.batches import LAW
from tests.routing.scored import choose, popular

pytestmark = pytest.mark.fast

E = 8
LOSSES: list[Loss] = [
    SwitchLoss(coefficient=0.01),
    GShardLoss(coefficient=0.01),
    SequenceLoss(coefficient=0.01),
    GlobalLoss(coefficient=0.01),
]
EVERY = [*LOSSES, ZLoss(coefficient=0.01)]


def chosen(score_TE: Tensor, top_k: int, valid_T: Tensor | None = None, length: int | None = None) -> Choice:
    choice = choose(score_TE, torch.zeros(score_TE.shape[1]), top_k, valid_T)
    return choice if length is None else replace(choice, length=length)


def cost(loss: Loss, choice: Choice) -> Tensor:
    return loss(choice, choice.load_E)


def softmax_of(tokens: int, seed: int = 0, experts: int = E) -> tuple[Tensor, Tensor]:
    """-> logit_TE, which wants a gradient, and score_TE"""
    logit_TE = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logit_TE = logit_TE.requires_grad_()
    return logit_TE, logit_TE.softmax(dim=1)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@given(st.integers(1, E), st.sampled_from([1.0, 0.3]))
@LAW
def test_uniform_loads_and_scores_cost_the_coefficient_for_every_k(loss: Loss, top_k: int, score: float) -> None:
    """score: sigmoid scores need not sum to 1."""
    expert_N = (torch.arange(E)[:, None] + torch.arange(top_k)).flatten() % E
    choice = chosen(torch.full((E, E), score, dtype=torch.float64), top_k)
    choice = replace(choice, expert_N=expert_N, wanted_N=expert_N)
    torch.testing.assert_close(cost(loss, choice), torch.full((E,), 0.01, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_mean_over_tokens_is_the_formula(top_k: int) -> None:
    """coefficient * E * sum of f * P, f as shares of rows."""
    choice = chosen(popular(48, E), top_k, length=12)
    mean_E = choice.score_TE.mean(dim=0)
    share_E = choice.load_E / (48 * top_k)
    first_E = torch.bincount(choice.expert_TK[:, 0], minlength=E) / 48
    want = {SwitchLoss: share_E, GlobalLoss: share_E, GShardLoss: first_E}
    for kind, f_E in want.items():
        torch.testing.assert_close(cost(kind(coefficient=0.5), choice).mean(), 0.5 * E * (f_E * mean_E).sum())
    parts = [chosen(score_TE, top_k) for score_TE in choice.score_TE.split(12)]
    by_sequence = torch.stack([cost(SwitchLoss(coefficient=0.5), part).mean() for part in parts]).mean()
    torch.testing.assert_close(cost(SequenceLoss(coefficient=0.5), choice).mean(), by_sequence)


def test_a_sequence_is_counted_as_it_would_choose_without_prices() -> None:
    score_TE = popular(32, E)
    free, priced = choose(score_TE, torch.zeros(E), 2), choose(score_TE, torch.linspace(0, 1, E), 2)
    assert not torch.equal(free.expert_N, priced.expert_N)
    loss = SequenceLoss(coefficient=1.0)
    assert torch.equal(loss(free, None), loss(priced, None))
    assert not torch.equal(cost(SwitchLoss(coefficient=1.0), free), cost(SwitchLoss(coefficient=1.0), priced))


def test_rows_that_were_dropped_are_wanted_all_the_same() -> None:
    choice = chosen(popular(32, E), 2)
    dropped = replace(choice, expert_N=torch.full_like(choice.expert_N, NOWHERE))
    for loss in (SwitchLoss(coefficient=1.0), GShardLoss(coefficient=1.0)):
        assert torch.equal(loss(choice, None), loss(dropped, None))


@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("rubbish", [0.0, 1e6, float("nan")])
def test_padding_costs_nothing_and_changes_nothing(loss: Loss, rubbish: float) -> None:
    valid_T = torch.arange(24) % 4 > 0
    logit_TE, score_TE = softmax_of(24)
    padded = chosen(score_TE.where(valid_T[:, None], rubbish), 2, valid_T, length=12)
    padded = replace(padded, logit_TE=logit_TE)
    alone = replace(chosen(score_TE[valid_T], 2, length=9), logit_TE=logit_TE[valid_T])
    cost_T = cost(loss, padded)
    assert not cost_T[~valid_T].any()
    torch.testing.assert_close(cost_T[valid_T], cost(loss, alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_the_gradient_takes_the_shares_for_constants(loss: Loss) -> None:
    """d cost_t / d score_t = the shares times E, less what normalising takes back."""
    _, score_TE = softmax_of(16)
    score_TE = score_TE.detach().requires_grad_()
    choice = chosen(score_TE, 2)
    (grad_TE,) = torch.autograd.grad(cost(loss, choice).sum(), score_TE)
    f_E = torch.bincount(choice.expert_TK[:, 0], minlength=E) / 16 if isinstance(loss, GShardLoss) else None
    share_E = E * (choice.load_E / 32 if f_E is None else f_E)
    sum_T1 = score_TE.sum(dim=1, keepdim=True)
    want_TE = 0.01 * (share_E - (score_TE / sum_T1 * share_E).sum(dim=1, keepdim=True)) / sum_T1
    torch.testing.assert_close(grad_TE, want_TE)


def test_large_logits_cost_the_square_of_their_logsumexp() -> None:
    logit_TE, score_TE = softmax_of(16)
    cost_T = ZLoss(coefficient=1e-3)(replace(chosen(score_TE, 2), logit_TE=logit_TE), None)
    torch.testing.assert_close(cost_T, 1e-3 * logit_TE.exp().sum(dim=1).log().square())


@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: type(loss).__name__)
def test_autocast_does_not_round_a_loss(loss: Loss) -> None:
    choice = chosen(popular(64, E).float(), 2, length=16)
    with torch.autocast("cpu", torch.bfloat16):
        cost_T = cost(loss, choice)
    assert cost_T.dtype == torch.float32
    assert torch.equal(cost_T, cost(loss, choice))


@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("length", [None, 4])
def test_a_batch_without_tokens_costs_nothing(loss: Loss, length: int | None) -> None:
    choice = chosen(torch.zeros(0, E), 2, length=length)
    assert cost(loss, choice).shape == (0,)
    all_padding = chosen(popular(8, E), 2, torch.zeros(8, dtype=torch.bool), length=length)
    assert not cost(loss, all_padding).any()


def test_layers_that_collapsed_on_different_experts_each_read_collapsed() -> None:
    """Pooled over the layers they would read even: 1."""
    logit_LTE = torch.zeros(4, 64, E)
    for layer in range(4):
        logit_LTE[layer, :, layer] = 10.0
    read = [float(cost(SwitchLoss(coefficient=1.0), chosen(z.softmax(dim=1), 1)).mean()) for z in logit_LTE]
    assert all(7.9 < one <= 8.0 for one in read)


@pytest.mark.parametrize("kind", [SwitchLoss, GShardLoss, SequenceLoss, GlobalLoss, ZLoss])
@pytest.mark.parametrize("coefficient", [-1e-3, math.nan, math.inf])
def test_a_loss_that_rewards_imbalance_is_refused(kind: type[SwitchLoss], coefficient: float) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} has coefficient={coefficient}"):
        kind(coefficient=coefficient)


def test_losses_say_what_they_lack() -> None:
    choice = chosen(popular(16, E), 2)
    with pytest.raises(ValueError, match="needs the loads of the whole step"):
        GlobalLoss(coefficient=1.0)(choice, None)
    with pytest.raises(ValueError, match="use SwitchLoss"):
        GShardLoss(coefficient=1.0)(replace(choice, top_k=None), None)
