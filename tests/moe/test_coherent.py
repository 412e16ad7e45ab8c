"""A token that follows its experts gets what it would get at home, and crosses fewer ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe import MoE, MoEConfig, World
from moe.coherent import Traffic, follow, gather_context, hop
from moe.comm import Peers, gather_objects, world_group
from placement import Placement
from routing import Assignment, Capacity, Choice, ExpertChoice, NearestCopy, Unpriced
from tests.routing.batches import at_homes, contiguous
from tests.world import build, relative

Worlds = Callable[[int], World]
PLACEMENTS: dict[str, Callable[[int], Placement]] = {
    "contiguous": partial(contiguous, 8),
    "one rank has all": lambda ranks: at_homes([ranks - 1] * 8, ranks),
    "copies": lambda ranks: at_homes([0, 1, 0, 1, 0, 1, 0, 1], ranks, [(ranks - 1, 0), (0, 3), (1, 4)]),
}


def config(top_k: int, **more: Any) -> MoEConfig:
    return MoEConfig(dim=6, hidden=5, num_experts=8, top_k=top_k, assigner=NearestCopy(), **more)


@pytest.mark.fast
@given(data=st.data(), ranks=st.integers(1, 5), top_k=st.integers(1, 4))
def test_experts_run_where_they_are_held_and_tokens_go_where_most_of_theirs_are(
    data: st.DataObject, ranks: int, top_k: int
) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    homes = random.integers(ranks, size=6).tolist()
    copies = [(int(random.integers(ranks)), int(random.integers(6))) for _ in range(data.draw(st.integers(0, 4)))]
    placement = at_homes(homes, ranks, copies)
    tokens = data.draw(st.integers(0, 12))
    expert_TK = np.array([random.permutation(6)[:top_k] for _ in range(tokens)], dtype=np.int64).reshape(tokens, top_k)
    here_T, pinned_T = random.integers(ranks, size=tokens), random.random(tokens) < 0.3
    step = hop(expert_TK, here_T, pinned_T, placement)
    for experts, here, pinned, rank_K, goes_on in zip(expert_TK, here_T, pinned_T, step.rank_TK, step.next_T):
        for expert, rank in zip(experts, rank_K):
            assert placement.held_RE[rank, expert]
            assert rank == here or not placement.held_RE[here, expert], "a copy was at hand"
        votes = np.bincount(rank_K, minlength=ranks)
        if pinned:
            assert goes_on == here
        else:
            assert goes_on == next(rank for rank in rank_K if votes[rank] == votes.max()), "of equals, the heavier's"
    assigned = step.assignment(placement)
    assert assigned.count_RE.sum() == expert_TK.size
    assert not assigned.loans(placement), "an expert would have to visit"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("where", PLACEMENTS)
def test_tokens_that_follow_their_experts_become_what_they_would_at_home(world: Worlds, ranks: int, where: str) -> None:
    for top_k, more in ((1, {}), (2, {"bias": True}), (4, {"shared_hidden": 3})):
        for share in (0.0, 0.4):  # pinned
            for errors, _ in world(ranks).run(_walk, config(top_k, **more), PLACEMENTS[where](ranks), share):
                assert max(errors) < 1e-12


def _walk(settings: MoEConfig, placement: Placement, share: float, dtype: torch.dtype = torch.float64) -> Any:
    """Three layers, from tokens on any rank. -> by layer: the largest error of tokens that are here, and the traffic"""
    peers, random = Peers.of(world_group()), np.random.default_rng(0)
    layer = build(settings, world_group(), placement, dtype).eval()
    alone = build(settings, None, None, dtype).eval()
    tokens = 17
    x_TD = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    rank_T, pinned_T = random.integers(peers.size - 1, size=tokens), random.random(tokens) < share
    here_TD = x_TD[rank_T == peers.rank]
    errors, traffic = [], []
    for _ in range(3):
        x_TD = x_TD + alone(norm(x_TD))
        here_TD, rank_T, crossed = follow(layer, here_TD, rank_T, pinned_T, norm)
        errors.append(relative(here_TD, x_TD[rank_T == peers.rank]))
        traffic.append(crossed)
    everybody = gather_objects((rank_T.tolist(), traffic), peers)
    assert everybody == [everybody[0]] * peers.size, "ranks disagree on who is where"
    return errors, traffic


def norm(x_TD: Tensor) -> Tensor:
    return F.layer_norm(x_TD, x_TD.shape[-1:])


def test_with_one_expert_a_token_a_layer_is_one_exchange_and_at_most_a_row_a_token(world: Worlds) -> None:
    for _, traffic in world(4).run(_walk, config(1), contiguous(8, 4), 0.0):
        assert [crossed.exchanges for crossed in traffic] == [1, 1, 1]
        assert all(crossed.rows <= 17 for crossed in traffic)
        assert all(crossed.bytes == crossed.rows * (6 + 1) * 8 for crossed in traffic)
        assert traffic[0] != traffic[2], "tokens do not move"
        # the same weights in every layer: a token that has found its rank need not leave it unless its choice changes
        assert traffic[2].rows < 17
    for _, traffic in world(4).run(_walk, config(1), at_homes([2] * 8, 4), 0.0):
        assert [crossed.rows for crossed in traffic[1:]] == [0, 0], "all experts on a rank: who is there stays there"


def test_a_narrow_type_follows_as_it_stays(world: Worlds) -> None:
    for errors, _ in world(2).run(_walk, config(2), contiguous(8, 2), 0.3, torch.bfloat16):
        assert max(errors) < 0.05


def test_a_step_without_a_token_is_a_step(world: Worlds) -> None:
    assert all(world(2).run(_empty))


def _empty() -> bool:
    layer = build(config(2), world_group(), None, torch.float64).eval()
    none_T = np.zeros(0, dtype=np.int64)
    x_TD, rank_T, traffic = follow(layer, torch.zeros(0, 6).double(), none_T, none_T.astype(bool), norm)
    return x_TD.shape == (0, 6) and len(rank_T) == 0 and traffic == Traffic(1, 0, 0)


def test_observers_hear_of_every_row_where_its_token_is(world: Worlds) -> None:
    for heard in world(2).run(_heard):
        assert [sum(map(sum, count_RE)) for count_RE, _ in heard] == [34]
        assert heard[0][1] == [34, 0]


def _heard() -> Any:
    peers = Peers.of(world_group())
    layer = build(config(2), world_group(), at_homes([0] * 8, 2), torch.float64).eval()
    heard: list[Any] = []

    def hear(choice: Choice, assignment: Assignment) -> None:
        heard.append((assignment.count_RE.tolist(), assignment.load_R.tolist()))

    layer.observe(hear)
    rank_T = np.arange(17) % 2
    follow(layer, torch.randn(int((rank_T == peers.rank).sum()), 6).double(), rank_T, rank_T < 0, norm)
    return heard


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_what_each_layer_made_of_each_token(world: Worlds, ranks: int) -> None:
    assert _gathered()
    assert all(world(ranks).run(_gathered))


def _gathered() -> bool:
    peers, random = Peers.of(world_group()), np.random.default_rng(3)
    rank_LT = [random.integers(peers.size, size=11), np.zeros(11, dtype=np.int64), random.integers(peers.size, size=11)]
    row_LTD = torch.randn(3, 11, 2, generator=torch.Generator().manual_seed(0))
    mine = [row_TD[rank_T == peers.rank] for row_TD, rank_T in zip(row_LTD, rank_LT)]
    every, traffic = gather_context(mine, rank_LT, peers)
    assert (traffic.bytes == 0) == (peers.size == 1)
    return torch.equal(torch.stack(every), row_LTD)


@pytest.mark.parametrize("case", ["nan", "count", "type", "select"])
def test_what_is_wrong_on_one_rank_is_the_same_error_on_all(world: Worlds, case: str) -> None:
    bad = "NaN or Inf in the router's logits or prices: [1] tokens on ranks [1]"
    wanted = bad if case == "nan" else "bad input on rank 1"
    for kind, error in world(2).run(_refused, case):
        assert kind == "ValueError"
        assert wanted in error


@pytest.mark.parametrize("case", ["score", "choose", "norm"])
def test_whatever_one_rank_fails_with_in_its_decision_the_others_stop_too(world: Worlds, case: str) -> None:
    """Its own error stays what it is."""
    other, own = world(2).run(_refused, case)
    assert other == ("ValueError", "bad input on rank 1: all ranks stop with it (this is rank 0)")
    assert own == ("RuntimeError", "it broke")


def _refused(case: str) -> tuple[str, str]:
    peers = Peers.of(world_group())
    layer = build(config(2), world_group(), None, torch.float64).eval()
    rank_T = np.arange(6) % 2
    x_TD = torch.zeros(3 + (case == "count" and peers.rank == 1), 6).double()
    if case == "nan" and peers.rank == 1:
        x_TD[2, 0] = torch.nan
    if case == "type" and peers.rank == 1:
        x_TD = x_TD.float()
    if case == "select" and peers.rank == 1:
        layer.router.select = _cannot
    if case in ("score", "choose") and peers.rank == 1:
        setattr(layer.router, {"score": "logits", "choose": "choose"}[case], _breaks)
    try:
        follow(layer, x_TD, rank_T, rank_T < 0, _breaks if case == "norm" and peers.rank == 1 else lambda x: x)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _cannot(*_: object) -> None:
    raise ValueError("it wants to know more")


def _breaks(*_: object) -> Any:
    raise RuntimeError("it broke")


@pytest.mark.fast
def test_routers_that_do_not_give_every_token_its_experts_are_refused() -> None:
    rank_T = np.zeros(6, dtype=np.int64)
    for more in ({"select": ExpertChoice()}, {"drop": Capacity(factor=0.1)}):
        layer = MoE(replace(config(2), balancer=Unpriced(), **more)).eval()
        with pytest.raises(ValueError, match=r"to follow experts|following experts"):
            follow(layer, torch.randn(6, 6), rank_T, rank_T < 0, norm)
