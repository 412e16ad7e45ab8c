"""Rows that go and results that come are each other's transpose, for any choice and any assignment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import World, dispatch
from moe.comm import Peers, visitors
from moe.dispatch import Dispatch
from placement import RoundRobin, Topology
from routing import Assignment, Choice, LeastLoaded

Worlds = Callable[[int], World]
EXPERTS = 6


def random_choice(rank: int, seed: int, top_k: int | None) -> Choice:
    """A top-k choice with some rows that go nowhere; or, without top_k, any number of rows for each token."""
    rng = np.random.default_rng([seed, rank])
    num_tokens = int(rng.integers(0, 9)) * int(rng.random() < 0.8)
    if top_k is None:
        token_N = rng.integers(0, max(num_tokens, 1), 3 * num_tokens)
    else:
        token_N = np.repeat(np.arange(num_tokens), top_k)
    hot = rng.random() * 2
    expert_N = np.minimum(rng.exponential(EXPERTS / (1 + 3 * hot), len(token_N)).astype(np.int64), EXPERTS - 1)
    expert_N[rng.random(len(token_N)) < 0.2] = -1
    score_TE = torch.zeros(num_tokens, EXPERTS, dtype=torch.float64)
    return Choice(
        token_N=torch.from_numpy(token_N),
        expert_N=torch.from_numpy(expert_N),
        wanted_N=torch.from_numpy(expert_N),
        weight_N=torch.from_numpy(rng.standard_normal(len(token_N)) * (expert_N >= 0)).requires_grad_(),
        score_TE=score_TE,
        logit_TE=score_TE,
        price_E=torch.zeros(EXPERTS),
        valid_T=None,
        length=num_tokens,
        top_k=top_k,
        k=top_k or 1,
    )


def plan(ranks: int, seed: int, top_k: int | None) -> Assignment:
    count_RE = np.stack([random_choice(rank, seed, top_k).load_E.numpy() for rank in range(ranks)])
    return LeastLoaded(headroom=1.0)(count_RE, placement(ranks))


def placement(ranks: int):  # type: ignore[no-untyped-def]
    return RoundRobin().place(EXPERTS, Topology.fitting(num_experts=EXPERTS, ranks=ranks, ranks_per_node=ranks))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("top_k", [2, None], ids=["top-k", "any rows"])
def test_going_and_coming_are_adjoint_and_move_what_the_plan_says(world: Worlds, ranks: int, top_k: int | None) -> None:
    for seed in range(12):
        sums = np.sum(world(ranks).run(_adjoint, seed, top_k), axis=0)
        assert sums[0::2] == pytest.approx(sums[1::2], rel=1e-12)


def _adjoint(seed: int, top_k: int | None) -> list[float]:
    """<go x, m> and <x, total come m>; <go w, s> and <w, come s>; <w go x, m> and <x, total w come m>. What goes in and
    out equals the plan."""
    peers = Peers.of(dist.group.WORLD)
    choice, assignment = random_choice(peers.rank, seed, top_k), plan(peers.size, seed, top_k)
    active = [*placement(peers.size).experts_of(peers.rank)]
    active += visitors(assignment.loans(placement(peers.size)), peers.rank)
    dispatch = Dispatch.of(choice, assignment, active, peers)
    flow_RRE = assignment.flow_RRE()
    others = np.arange(peers.size) != peers.rank
    assert list(dispatch.send_R) == (flow_RRE[peers.rank].sum(axis=-1) * others).tolist()
    assert list(dispatch.recv_R) == (flow_RRE[:, peers.rank].sum(axis=-1) * others).tolist()
    assert list(dispatch.rows_A) == assignment.quota_RE[peers.rank, active].tolist()

    generator = torch.Generator().manual_seed(peers.rank)
    x = torch.randn(choice.num_tokens, 3, generator=generator, dtype=torch.float64)
    m = torch.randn(dispatch.num_rows + dispatch.room, 3, generator=generator, dtype=torch.float64)
    scalar_M = torch.randn(dispatch.num_rows, generator=generator, dtype=torch.float64)
    weight = choice.weight_N.detach()
    source, weight_M = dispatch.go(x, weight)
    rows, here = source[dispatch.index_M], m[: dispatch.num_rows].clone()
    scalar_N = dispatch.come(m, scalar_M)
    assert weight_M is not None
    assert scalar_N is not None
    pairs = [
        (rows, here),
        (x, dispatch.total(m, None)),
        (weight_M, scalar_M),
        (weight * (choice.expert_N >= 0), scalar_N),
        (rows * weight_M[:, None], here),
        (x, dispatch.total(m, weight)),
    ]
    return [(a * b).sum().item() for a, b in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_go_and_come_exactly_with_rows_of_any_type(world: Worlds, ranks: int, dtype: torch.dtype) -> None:
    """There, and back to where each came from: to the bit, though they travel in the rows' message."""
    for seed in range(4):
        assert all(world(ranks).run(_there_and_back, seed, dtype))


def _there_and_back(seed: int, dtype: torch.dtype) -> bool:
    peers = Peers.of(dist.group.WORLD)
    choice, assignment = random_choice(peers.rank, seed, 2), plan(peers.size, seed, 2)
    active = [int(expert) for expert in placement(peers.size).experts_of(peers.rank)]
    active += visitors(assignment.loans(placement(peers.size)), peers.rank)
    dispatch = Dispatch.of(choice, assignment, active, peers)
    weight = choice.weight_N.detach().float()
    source, weight_M = dispatch.go(torch.ones(choice.num_tokens, 5, dtype=dtype), weight)
    alone = dispatch.come(None, weight_M)
    buffer = torch.full((dispatch.num_rows + dispatch.room, 5), torch.nan, dtype=dtype)
    buffer[: dispatch.num_rows] = source[dispatch.index_M]
    together = dispatch.come(buffer, weight_M)
    assert alone is not None
    assert together is not None
    computed = torch.bincount(choice.token_N[choice.expert_N >= 0], minlength=choice.num_tokens)
    assert torch.equal(dispatch.total(buffer, None), computed[:, None].expand(-1, 5).to(dtype))
    return torch.equal(alone, weight) and torch.equal(together, weight)


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_expert_sees_its_rows_in_the_order_of_ranks_and_tokens(world: Worlds, ranks: int) -> None:
    """Rows carry (rank, token); an expert's rows arrive sorted by it, whoever computes them, each exactly once."""
    for seed in range(8):
        answers = world(ranks).run(_labels, seed)
        for expert in range(EXPERTS):
            arrived = [row for answer in answers for row in answer.get(expert, [])]
            for answer in answers:
                assert answer.get(expert, []) == sorted(answer.get(expert, []))
            want = []
            for rank in range(ranks):
                choice = random_choice(rank, seed, 2)
                want += [[rank, t] for t in choice.token_N[choice.expert_N == expert].tolist()]
            assert sorted(arrived) == sorted(want)


def _labels(seed: int) -> dict[int, list[list[int]]]:
    peers = Peers.of(dist.group.WORLD)
    choice, assignment = random_choice(peers.rank, seed, 2), plan(peers.size, seed, 2)
    active = [int(expert) for expert in placement(peers.size).experts_of(peers.rank)]
    active += visitors(assignment.loans(placement(peers.size)), peers.rank)
    dispatch = Dispatch.of(choice, assignment, active, peers)
    x = torch.tensor([[peers.rank, token] for token in range(choice.num_tokens)], dtype=torch.float64).view(-1, 2)
    parts = torch.split(dispatch.go(x, None)[0][dispatch.index_M], list(dispatch.rows_A))
    return {expert: part.long().tolist() for expert, part in zip(active, parts)}


@pytest.mark.fast
@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), max_size=7), min_size=1, max_size=4))
@settings(deadline=None, derandomize=True)
def test_runs_are_the_same_numbers_written_out_here_or_on_the_device(lists: list[list[tuple[int, int]]]) -> None:
    segments = [tuple(np.array(runs, dtype=np.int64).reshape(-1, 2).T) for runs in lists]
    for few in (-1, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "_FEW", few)
            written = dispatch._spread(segments, torch.device("cpu"))  # type: ignore[arg-type]
        assert [part.tolist() for part in written] == [
            [start + i for start, length in runs for i in range(length)] for runs in lists
        ]
        assert all(part.dtype == torch.int64 for part in written)


@pytest.mark.fast
@pytest.mark.parametrize("top_k", [2, None], ids=["top-k", "any rows"])
@pytest.mark.parametrize("seed", range(6))
def test_a_rank_alone_computes_every_row_once_whatever_the_order_of_its_experts(seed: int, top_k: int | None) -> None:
    choice, assignment = random_choice(0, seed, top_k), plan(1, seed, top_k)
    for active in (list(range(EXPERTS)), [4, 0, 5, 1, 3, 2]):
        here = Dispatch.of(choice, assignment, active, Peers.of(None))
        goes_N = choice.expert_N >= 0
        place_N = here.place_N[goes_N]
        assert sorted(place_N.tolist()) == list(range(here.num_rows))
        assert torch.equal(here.index_M[place_N], choice.token_N[goes_N])
        expert_M = torch.tensor(active).repeat_interleave(torch.tensor(here.rows_A))
        assert torch.equal(expert_M[place_N], choice.expert_N[goes_N])
        assert (here.place_N[~goes_N] == here.num_rows).all()
        assert here.room == int(not goes_N.all())
        for tokens in here.index_M.split(list(here.rows_A)):
            assert tokens.tolist() == sorted(tokens.tolist()) or top_k is None
