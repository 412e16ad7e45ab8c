"""ForcedRouter: the ranks' rows are as even as distinct experts allow, compared with the best there is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from routing import NOWHERE, ForcedRouter, Sigmoid, Softmax, Tokens, TopK, Weigh, forced_experts
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast


def load_of_ranks(expert_TK: NDArray[np.int64], home_E: Sequence[int]) -> NDArray[np.int64]:
    return np.bincount(np.asarray(home_E)[expert_TK.ravel()], minlength=max(home_E) + 1)


def together(num_tokens: int, top_k: int, home_E: Sequence[int], sources: int) -> NDArray[np.int64]:
    """The loads of the ranks when several sources force a batch of this size each."""
    home = np.array(home_E)
    tables = [forced_experts(num_tokens, top_k, home, source=source) for source in range(sources)]
    return load_of_ranks(np.concatenate(tables), home_E)


def evenest_by_trying(num_tokens: int, top_k: int, home_E: Sequence[int]) -> list[int]:
    """The evenest loads of the ranks, sorted, of all choices of K distinct experts for each token."""
    ranks = max(home_E) + 1
    of_a_token = {
        tuple(sum(home_E[expert] == rank for expert in experts) for rank in range(ranks))
        for experts in combinations(range(len(home_E)), top_k)
    }
    reached = {(0,) * ranks}
    for _ in range(num_tokens):
        reached = {tuple(a + b for a, b in zip(load, more)) for load in reached for more in of_a_token}
    return sorted(min(reached, key=lambda load_R: sum(load**2 for load in load_R)))


def evenest_by_filling(num_tokens: int, top_k: int, home_E: Sequence[int]) -> list[int]:
    """The same, row by row: each goes to the emptiest rank that still has a place; a rank has T for each expert."""
    load_R, places_R = [0] * (max(home_E) + 1), [num_tokens * list(home_E).count(r) for r in range(max(home_E) + 1)]
    for _ in range(num_tokens * top_k):
        open_R = [rank for rank, load in enumerate(load_R) if load < places_R[rank]]
        load_R[min(open_R, key=load_R.__getitem__)] += 1
    return sorted(load_R)


@st.composite
def routings(draw: st.DrawFn, tokens: int = 40, experts: int = 12, ranks: int = 6) -> tuple[int, int, list[int], int]:
    """T, K, home_E, source. Homes are uneven, and some ranks have none."""
    home_E = draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=experts))
    return draw(st.integers(0, tokens)), draw(st.integers(1, len(home_E))), home_E, draw(st.integers(0, 9))


@LAW
@given(routings(tokens=4, experts=5, ranks=3))
def test_the_two_yardsticks_agree(routing: tuple[int, int, list[int], int]) -> None:
    assert evenest_by_trying(*routing[:3]) == evenest_by_filling(*routing[:3])


@LAW
@given(routings(tokens=4, experts=5, ranks=3))
def test_no_choice_of_distinct_experts_is_more_even(routing: tuple[int, int, list[int], int]) -> None:
    num_tokens, top_k, home_E, source = routing
    expert_TK = forced_experts(num_tokens, top_k, np.array(home_E), source=source)
    assert sorted(load_of_ranks(expert_TK, home_E).tolist()) == evenest_by_trying(num_tokens, top_k, home_E)


@LAW
@given(routings())
def test_the_ranks_are_as_even_as_filling_them_row_by_row(routing: tuple[int, int, list[int], int]) -> None:
    num_tokens, top_k, home_E, source = routing
    expert_TK = forced_experts(num_tokens, top_k, np.array(home_E), source=source)
    assert sorted(load_of_ranks(expert_TK, home_E).tolist()) == evenest_by_filling(num_tokens, top_k, home_E)


@LAW
@given(routings())
def test_every_token_gets_k_distinct_experts(routing: tuple[int, int, list[int], int]) -> None:
    num_tokens, top_k, home_E, source = routing
    expert_TK = forced_experts(num_tokens, top_k, np.array(home_E), source=source)
    assert expert_TK.shape == (num_tokens, top_k)
    assert expert_TK.dtype == np.int64
    assert all(len(set(experts)) == top_k for experts in expert_TK.tolist())
    assert set(expert_TK.ravel().tolist()) <= set(range(len(home_E)))


@LAW
@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 4), st.data())
def test_where_homes_are_even_the_ranks_differ_by_at_most_one_row(
    num_tokens: int, ranks: int, experts: int, data: st.DataObject
) -> None:
    home_E = np.tile(np.arange(ranks), experts)
    top_k = data.draw(st.integers(1, len(home_E)))
    load_R = load_of_ranks(forced_experts(num_tokens, top_k, home_E, source=data.draw(st.integers(0, 9))), home_E)
    assert np.ptp(load_R) <= 1


@LAW
@given(routings(tokens=12), st.integers(1, 8))
def test_several_sources_together_are_as_even_as_one_batch_of_all_their_tokens(
    routing: tuple[int, int, list[int], int], sources: int
) -> None:
    num_tokens, top_k, home_E, _ = routing
    load_R = together(num_tokens, top_k, home_E, sources)
    assert sorted(load_R.tolist()) == evenest_by_filling(sources * num_tokens, top_k, home_E)


@LAW
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 40), st.integers(1, 12), st.data())
def test_several_sources_together_differ_by_at_most_one_row_where_each_rank_has_places_for_its_share(
    slots_R: list[int], num_tokens: int, sources: int, data: st.DataObject
) -> None:
    home_E = data.draw(st.permutations([rank for rank, slots in enumerate(slots_R) for _ in range(slots)]))
    top_k = data.draw(st.integers(1, len(slots_R) * min(slots_R)))
    assert np.ptp(together(num_tokens, top_k, home_E, sources)) <= 1


@LAW
@given(st.integers(1, 40), st.lists(st.integers(0, 4), min_size=1, max_size=10))
def test_if_every_token_takes_every_expert_every_expert_gets_every_token(num_tokens: int, home_E: list[int]) -> None:
    expert_TK = forced_experts(num_tokens, len(home_E), np.array(home_E))
    assert np.array_equal(np.sort(expert_TK, axis=1), np.tile(np.arange(len(home_E)), (num_tokens, 1)))


@LAW
@given(routings())
def test_the_choice_is_the_same_again_to_the_bit(routing: tuple[int, int, list[int], int]) -> None:
    num_tokens, top_k, home_E, source = routing
    first, second = (forced_experts(num_tokens, top_k, np.array(home_E), source=source) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def forced(top_k: int = 2, *, source: int = 0, weigh: Weigh = Weigh()) -> ForcedRouter:
    torch.manual_seed(0)
    return ForcedRouter(4, 6, top_k, home_E=[0, 0, 1, 1, 2, 2], source=source, score=Sigmoid(), weigh=weigh)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_the_forced_router_chooses_evenly_and_weighs_by_its_scores(source: int) -> None:
    layer = forced(source=source)
    layer.price_E.copy_(torch.tensor([9.0, 0, 0, 0, 0, -9.0]))
    choice = layer(torch.randn(10, 4))
    expected_TK = forced_experts(10, 2, np.array([0, 0, 1, 1, 2, 2]), source=source)
    assert choice.expert_TK.tolist() == expected_TK.tolist()
    assert torch.equal(choice.weight_N, choice.score_TE[choice.token_N, choice.expert_N])
    assert int(choice.load_E.view(3, 2).sum(dim=1).max()) == 7
    choice.weight_N.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()


def test_the_forced_router_sends_padding_nowhere() -> None:
    valid_T = torch.tensor([True, False, True, True])
    choice = forced(weigh=Weigh(normalize=True))(torch.randn(4, 4), valid_T)
    assert choice.expert_TK[1].tolist() == [NOWHERE, NOWHERE]
    assert (choice.expert_TK[valid_T] != NOWHERE).all()
    assert int(choice.load_E.sum()) == 6


def test_the_forced_router_routes_no_tokens() -> None:
    assert forced()(torch.zeros(0, 4)).expert_TK.shape == (0, 2)


def test_the_forced_router_replays_given_rows() -> None:
    free = forced(source=1)(torch.randn(5, 4))
    rows = TopK()(-torch.arange(30.0).view(5, 6), torch.zeros(6), 2, Tokens(None, 5))
    assert torch.equal(forced(source=1)(torch.randn(5, 4), rows=rows).expert_N, rows.expert_N)
    assert not torch.equal(free.expert_N, rows.expert_N)


@pytest.mark.parametrize("home_E", [[0, 1], [[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, -1]])
def test_homes_of_other_experts_are_refused_by_the_number_expected(home_E: list[object]) -> None:
    with pytest.raises(ValueError, match="each of 6 experts"):
        ForcedRouter(4, 6, 2, home_E=home_E, score=Softmax())
