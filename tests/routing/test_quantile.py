"""Quantile: the middle of what is best reaches balance where the edge rests short of it, on counts that add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from routing.dual import dual_gap, dual_value, expert_ends, token_ends, transposed
from routing.histogram import Histogram
from routing.quantile import EdgeQuantile, Quantile
from tests.routing.scored import (
    NO_STEPS,
    STALL,
    choose,
    drifting,
    max_violation,
    observed,
    popular,
    quoted,
    step,
    unlike,
    violations,
)

F1 = 298.083265


@pytest.mark.fast
@pytest.mark.parametrize(
    "balancer, expected",
    [
        (EdgeQuantile(rounds=4), 0.046875),
        (EdgeQuantile(rounds=14), 0.0234375),
        (Quantile(rounds=4), 0.0234375),
        (Quantile(rounds=14), 0.0078125),
        (Quantile(rounds=4, polish=12), 0.0078125),
    ],
    ids=repr,
)
def test_more_rounds_balance_better_and_middles_better_than_edges(balancer: Quantile, expected: float) -> None:
    score_TE = popular(512, 16)
    assert max_violation(choose(score_TE, quoted(balancer, score_TE, 4), 4)) <= expected


@pytest.mark.fast
def test_fourteen_rounds_of_middles_close_the_gap() -> None:
    score_TE = popular(512, 16)
    assert dual_gap(score_TE, quoted(Quantile(rounds=14), score_TE, 4), 4, kept=F1) < 1e-7
    assert dual_gap(score_TE, quoted(EdgeQuantile(rounds=14), score_TE, 4), 4, kept=F1) > 1e-5


@pytest.mark.fast
def test_one_edge_round_of_the_small_example_is_as_worked_by_hand() -> None:
    price_E = quoted(EdgeQuantile(rounds=1), STALL, 1)
    assert (-price_E).tolist() == pytest.approx([-0.2575, -0.0275, 0.0425, 0.2425], abs=1e-7)


@pytest.mark.fast
def test_where_the_edge_rests_the_middle_finds_the_optimum() -> None:
    edge_E, middle_E = quoted(EdgeQuantile(rounds=50), STALL, 1), quoted(Quantile(rounds=20), STALL, 1)
    assert dual_value(STALL, edge_E, 1) == pytest.approx(4.92)
    assert choose(STALL, edge_E, 1).load_E.tolist() == [3, 3, 2, 0]
    assert dual_value(STALL, middle_E, 1) == pytest.approx(4.88)
    assert choose(STALL, middle_E, 1).load_E.tolist() == [2, 2, 2, 2]


@pytest.mark.fast
def test_without_rounds_a_batch_is_quoted_the_standing_prices() -> None:
    price_E = torch.linspace(-1, 1, 16)
    assert quoted(Quantile(rounds=0), popular(512, 16), 4, price_E) is price_E


def settled_from(balancer: Quantile, parts: list[Tensor], price_E: Tensor, top_k: int) -> Tensor:
    choices = [choose(part_TE, price_E, top_k) for part_TE in parts]
    return balancer.settle(price_E, observed(balancer, choices, price_E), top_k, settled=NO_STEPS)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_standing_prices_are_the_same_to_the_bit_however_tokens_are_spread(dtype: torch.dtype) -> None:
    """One rank, eight ranks, eight micro-batches, ragged ones: a shuffle and a split are all there is to it."""
    score_TE = torch.cat(unlike()).to(dtype)[:2001]
    price_E = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    shuffle = torch.randperm(len(score_TE), generator=torch.Generator().manual_seed(1))
    for balancer in (Quantile(), EdgeQuantile(), Quantile(bins=17)):
        whole_E = settled_from(balancer, [score_TE], price_E, 2)
        for parts in (score_TE.chunk(8), score_TE[shuffle].chunk(8), score_TE.split(3), score_TE.split([1, 2000, 0])):
            assert torch.equal(settled_from(balancer, list(parts), price_E, 2), whole_E)


@pytest.mark.fast
def test_standing_prices_do_not_depend_on_what_each_batch_was_quoted() -> None:
    parts, price_E = unlike(), torch.linspace(-0.2, 0.2, 16)
    whole_E = settled_from(Quantile(), [torch.cat(parts)], price_E, 2)
    assert torch.equal(step(Quantile(rounds=2, polish=1), parts, price_E, 2)[0], whole_E)


@pytest.mark.fast
@pytest.mark.parametrize("kind", [Quantile, EdgeQuantile])
@pytest.mark.parametrize("bins", [64, 256, 1000])
def test_a_settled_step_is_a_round_on_all_tokens_to_within_a_bin(kind: type[Quantile], bins: int) -> None:
    score_TE, price_E = torch.cat(unlike()), torch.linspace(-0.2, 0.2, 16)
    settled_E = settled_from(kind(bins=bins), [score_TE], price_E, 2).double()
    exact_E = quoted(kind(rounds=1), score_TE, 2, price_E)
    token_price_T = kind().pick(token_ends(score_TE - price_E, 2))
    moved_E = kind().pick(expert_ends(transposed(score_TE - token_price_T[:, None]), 2)) - price_E
    edge_B = Histogram(bins=bins, reach=2.0).edges(torch.device("cpu"))
    width_E = edge_B.diff()[torch.bucketize(moved_E, edge_B) - 1]
    assert (settled_E - exact_E).abs().max() <= width_E.max()


@pytest.mark.fast
def test_two_unlike_micro_batches_are_balanced_together() -> None:
    """Measured: .006 after 20 steps and below .002 after 200, where 4000 bins of one width rest at .05."""
    price_E, scores = torch.zeros(16), unlike()
    for settled in range(1, 61):
        price_E, _ = step(Quantile(rounds=0), scores, price_E, 2, settled)
        if settled == 20:
            assert max_violation(*(choose(score_TE, price_E, 2) for score_TE in scores)) <= 0.01
    assert max_violation(*(choose(score_TE, price_E, 2) for score_TE in scores)) <= 0.005


@pytest.mark.fast
def test_prices_keep_a_mean_of_zero() -> None:
    price_E = torch.linspace(0, 1, 16)
    score_TE = popular(512, 16)
    assert step(Quantile(), [score_TE], price_E, 4)[0].mean().abs() < 1e-7
    assert quoted(Quantile(), score_TE, 4, price_E).mean().abs() < 1e-12


def floor(num_experts: int, top_k: int, num_tokens: int = 4096) -> float:
    """The mean violation that the tokens' chance alone leaves, if every expert is as likely: sampled."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(100):
        expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
        load_E = torch.bincount(expert_TK.flatten(), minlength=num_experts).double()
        seen.append(float(load_E.max() / load_E.mean() - 1))
    return sum(seen) / len(seen)


@pytest.mark.parametrize("num_experts, top_k", [(16, 4), (64, 8)])
def test_prices_of_the_step_before_balance_a_drifting_stream(num_experts: int, top_k: int) -> None:
    """Both rules, from histograms, to within 2.2 times the violation that chance leaves."""
    for balancer in (Quantile(rounds=0), EdgeQuantile(rounds=0)):
        seen = violations(balancer, drifting(num_experts, 4096, 80), num_experts, top_k)
        assert sum(seen[-50:]) / 50 <= 2.2 * floor(num_experts, top_k)
