"""TopK: the best experts of each token, in its best groups only."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing import Router, Rows, Sigmoid, Tokens, TopK
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
TOKENS = Tokens(None, 0)
Worth = Literal["max", "top2sum"]


def chosen(select: TopK, priced_TE: Tensor, top_k: int) -> Rows:
    """At prices such that score less price is this, exactly."""
    price_E = torch.arange(priced_TE.shape[1]) / 8
    return select(priced_TE + price_E, price_E, top_k, TOKENS)


def best_by_sorting(priced_E: list[float], top_k: int, select: TopK) -> tuple[list[int], set[int]]:
    """The definition, for one token: its picks, best first, and the experts it may pick."""
    size = len(priced_E) // select.groups
    best = 2 if select.worth == "top2sum" else 1
    groups = [range(group * size, (group + 1) * size) for group in range(select.groups)]
    groups.sort(key=lambda experts: -sum(sorted((priced_E[expert] for expert in experts), reverse=True)[:best]))
    allowed = [expert for experts in groups[: select.keep] for expert in experts]
    return sorted(allowed, key=lambda expert: -priced_E[expert])[:top_k], set(allowed)


@st.composite
def selections(draw: st.DrawFn, grouped: bool) -> tuple[Tensor, int, TopK]:
    """Distinct prices without ties, so that the definition has one answer; all negative, of mixed sign, or positive."""
    groups = draw(st.integers(2, 6)) if grouped else 1
    keep = draw(st.integers(1, groups - 1)) if grouped else 1
    size = draw(st.integers(1, 5))
    worth: Worth = draw(st.sampled_from(["max", "top2sum"]))
    top_k = draw(st.integers(1, keep * size))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shift = draw(st.sampled_from([-1e6, -40.0, 0.0, 40.0]))
    # A million values: groups do not tie either. fp64 holds their sums exactly.
    priced_TE = rng.permuted(np.tile(rng.choice(2**20, groups * size, replace=False), (7, 1)), axis=1) / 2**15 + shift
    return torch.from_numpy(priced_TE), top_k, TopK(groups=groups, keep=keep, worth=worth)


@LAW
@given(selections(grouped=False))
def test_each_token_takes_its_best_experts_best_first(selection: tuple[Tensor, int, TopK]) -> None:
    priced_TE, top_k, select = selection
    rows = chosen(select, priced_TE, top_k)
    expected = [best_by_sorting(priced_E, top_k, select)[0] for priced_E in priced_TE.tolist()]
    assert rows.expert_N.view(-1, top_k).tolist() == expected


@LAW
@given(selections(grouped=True))
def test_each_token_takes_the_best_experts_of_its_best_groups(selection: tuple[Tensor, int, TopK]) -> None:
    priced_TE, top_k, select = selection
    rows = chosen(select, priced_TE, top_k)
    expected = [best_by_sorting(priced_E, top_k, select)[0] for priced_E in priced_TE.tolist()]
    assert rows.expert_N.view(-1, top_k).tolist() == expected


@LAW
@given(selections(grouped=True))
def test_no_pick_lies_outside_the_best_groups_though_all_priced_scores_are_negative(
    selection: tuple[Tensor, int, TopK],
) -> None:
    priced_TE, top_k, select = selection
    negative_TE = priced_TE - priced_TE.max() - 1.0
    rows = chosen(select, negative_TE, top_k)
    for priced_E, picks in zip(negative_TE.tolist(), rows.expert_N.view(-1, top_k).tolist()):
        assert set(picks) <= best_by_sorting(priced_E, top_k, select)[1]


@LAW
@given(selections(grouped=True))
def test_rows_are_k_distinct_experts_for_each_token_in_token_order(selection: tuple[Tensor, int, TopK]) -> None:
    priced_TE, top_k, select = selection
    price_E, before = torch.zeros(priced_TE.shape[1]), priced_TE.clone()
    rows = select(priced_TE, price_E, top_k, TOKENS)
    assert rows.top_k == top_k
    assert rows.token_N.dtype == rows.expert_N.dtype == torch.int64
    assert rows.token_N.tolist() == [token for token in range(len(priced_TE)) for _ in range(top_k)]
    assert all(len(set(picks)) == top_k for picks in rows.expert_N.view(-1, top_k).tolist())
    assert torch.equal(priced_TE, before), "the selector wrote into the scores"


def test_a_group_is_worth_its_best_expert_or_its_two_best_together() -> None:
    """Group 0 has the best expert, group 1 the best pair, group 2 the best sum of all."""
    priced_TE = torch.tensor([[9.0, 0.0, 0.0, 8.0, 7.0, -9.0, 6.0, 6.0, 6.0]])
    assert chosen(TopK(groups=3, keep=1, worth="max"), priced_TE, 1).expert_N.tolist() == [0]
    assert chosen(TopK(groups=3, keep=1, worth="top2sum"), priced_TE, 1).expert_N.tolist() == [3]


def test_a_group_of_one_expert_is_worth_that_expert_even_as_a_pair() -> None:
    priced_TE = torch.tensor([[-3.0, -1.0, -2.0]])
    assert chosen(TopK(groups=3, keep=2, worth="top2sum"), priced_TE, 2).expert_N.tolist() == [1, 2]


@LAW
@given(selections(grouped=True))
def test_keeping_every_group_limits_nothing(selection: tuple[Tensor, int, TopK]) -> None:
    priced_TE, top_k, select = selection
    all_kept = TopK(groups=select.groups, keep=select.groups, worth=select.worth)
    assert torch.equal(chosen(all_kept, priced_TE, top_k).expert_N, chosen(TopK(), priced_TE, top_k).expert_N)


@pytest.mark.parametrize("select", [TopK(), TopK(groups=2, keep=1), TopK(groups=4, keep=2, worth="top2sum")])
def test_equal_scores_still_choose_distinct_experts_of_as_few_groups(select: TopK) -> None:
    picks_TK = chosen(select, torch.full((50, 8), -0.5), 3).expert_N.view(50, 3)
    for picks in picks_TK.tolist():
        assert len(set(picks)) == 3
        assert len({expert * select.groups // 8 for expert in picks}) <= select.keep


@pytest.mark.parametrize("worth", ["max", "top2sum"])
def test_a_price_below_which_every_score_lies_keeps_all_picks_in_the_best_groups(worth: Worth) -> None:
    """A limit that put 0.0 on the other groups would then send every pick there."""
    torch.manual_seed(0)
    select = TopK(groups=8, keep=4, worth=worth)
    router = Router(16, 64, 8, score=Sigmoid(), select=select)
    router.price_E.fill_(1.2)
    x_TD = torch.randn(512, 16)
    choice = router(x_TD)
    priced_TE = choice.score_TE.detach() - 1.2
    assert (priced_TE < 0).all()
    for priced_E, picks in zip(priced_TE.tolist(), choice.expert_TK.tolist()):
        assert set(picks) <= best_by_sorting(priced_E, 8, select)[1]
    router.price_E.copy_(12 * torch.randn(64))
    again = router(x_TD, rows=Rows(choice.token_N, choice.expert_N, 8))
    assert torch.equal(again.weight_N, choice.weight_N), "a weight saw a price"


def test_no_tokens_choose_no_experts() -> None:
    rows = chosen(TopK(groups=2, keep=1), torch.zeros(0, 8), 3)
    assert rows.token_N.shape == rows.expert_N.shape == (0,)


@pytest.mark.parametrize(
    ("select", "num_experts", "top_k", "told"),
    [
        (TopK(), 4, 5, "top_k=5 of 4 experts"),
        (TopK(), 4, 0, "top_k=0 of 4 experts"),
        (TopK(groups=3, keep=2), 8, 2, "8 experts do not divide into 3 groups"),
        (TopK(groups=4, keep=2), 8, 5, "top_k=5, but 2 of 4 groups hold only 4 experts"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_by_its_numbers(
    select: TopK, num_experts: int, top_k: int, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        select.check(num_experts, top_k)


@LAW
@given(selections(grouped=True))
def test_a_choice_that_can_be_made_is_not_refused(selection: tuple[Tensor, int, TopK]) -> None:
    priced_TE, top_k, select = selection
    select.check(priced_TE.shape[1], top_k)


@pytest.mark.parametrize(("groups", "keep"), [(2, 3), (2, 0), (0, 0), (0, 1), (-1, -1)])
def test_keeping_more_groups_than_there_are_or_none_is_refused(groups: int, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keeps {keep} of {groups} groups"):
        TopK(groups=groups, keep=keep)


def test_an_unknown_worth_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'mean'"):
        TopK(groups=2, keep=1, worth="mean")  # type: ignore[arg-type]
