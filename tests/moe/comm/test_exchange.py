"""exchange moves rows and its backward is its transpose; Lending brings weights out and gradients home."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe import World, WorldError
from moe.comm import Lending, Peers, exchange, sum_over, tie, visitors
from placement import Placement
from routing import Loan

Worlds = Callable[[int], World]


def splits(ranks: int, seed: int, *, high: int = 5) -> list[list[int]]:
    """rows[source][destination], with some zeros."""
    table: list[list[int]] = np.random.default_rng(seed).integers(0, high, (ranks, ranks)).tolist()
    table[-1] = [0] * ranks
    return table


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_backward_of_exchange_is_its_adjoint(world: Worlds, ranks: int) -> None:
    """<P x, w> == <x, P^T w>, summed over the ranks."""
    for seed in range(5):
        forward, backward = zip(*world(ranks).run(_adjoint, splits(ranks, seed)))
        assert sum(forward) == pytest.approx(sum(backward), rel=1e-13)


def _adjoint(rows: list[list[int]]) -> tuple[float, float]:
    peers = Peers.of(dist.group.WORLD)
    send, recv = rows[peers.rank], [row[peers.rank] for row in rows]
    generator = torch.Generator().manual_seed(peers.rank)
    x = torch.randn(sum(send), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(sum(recv), 3, generator=generator, dtype=torch.float64)
    y = exchange(x, send, recv, peers)
    (y * w).sum().backward()
    assert x.grad is not None
    return (y * w).sum().item(), (x * x.grad).sum().item()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8], ids=str
)
def test_rows_of_any_type_arrive_as_they_left(world: Worlds, dtype: torch.dtype) -> None:
    rows = splits(4, 7)
    for rank, arrived in enumerate(world(4).run(_labels, rows, dtype)):
        want = [[s, k, rank] for s in range(4) for k in range(rows[s][rank])]
        assert arrived == want


def _labels(rows: list[list[int]], dtype: torch.dtype) -> Any:
    peers = Peers.of(dist.group.WORLD)
    sent = [[peers.rank, k, d] for d in range(peers.size) for k in range(rows[peers.rank][d])]
    x = torch.tensor(sent, dtype=torch.float32).view(-1, 3).to(dtype)
    y = exchange(x, rows[peers.rank], [row[peers.rank] for row in rows], peers)
    assert y.dtype == dtype
    return y.to(torch.float32).long().tolist()


def test_more_rows_than_splits_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows, but send_R=\\[2\\] sends 2"):
        exchange(torch.zeros(3, 1), [2], [2], Peers.of(None))


PLACEMENT = Placement(expert_RS=np.array([[0, 1], [2, -1], [3, -1]]))
LOANS = (
    Loan(expert=0, lender=0, borrower=1),
    Loan(expert=0, lender=0, borrower=2),
    Loan(expert=3, lender=2, borrower=1),
)


def test_visitors_are_the_lenders_weights_and_their_gradients_are_added_at_home(world: Worlds) -> None:
    answers = world(3).run(_lend_and_return, torch.float64)
    visiting, grad = zip(*answers)
    assert visiting == ([], [[0.0, 0.0], [3.0, 3.0]], [[0.0, 0.0]])
    # each rank's own gradient is 1, a visitor's 10 * (borrower + 1)
    assert grad == ([[1.0 + 20.0 + 30.0] * 2, [1.0] * 2], [[1.0] * 2], [[1.0 + 20.0] * 2])


def test_gradients_come_home_in_fp32_and_are_rounded_once(world: Worlds) -> None:
    """256 + 1 + 1 is 258 in bf16; added one by one it would stay 256, where the spacing is 2."""
    grads = world(3).run(_small_returns)
    assert grads[0] == [[258.0]]


def test_lending_is_the_adjoint_of_giving_back(world: Worlds) -> None:
    """<guests of W, V> == <W, what comes home of V>, summed over the ranks."""
    out, home = zip(*world(3).run(_there_and_back))
    assert sum(out) == pytest.approx(sum(home), rel=1e-13)


def _there_and_back() -> tuple[float, float]:
    peers = Peers.of(dist.group.WORLD)
    lending = Lending.of(LOANS, PLACEMENT.experts_of(peers.rank).tolist(), peers)
    generator = torch.Generator().manual_seed(peers.rank)
    slots = len(PLACEMENT.experts_of(peers.rank))
    weights = [torch.randn(slots, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (2,))]
    guests = lending.fetch(weights).wait()
    cotangents = [torch.randn(guest.shape, generator=generator, dtype=torch.float64) for guest in guests]
    came = lending.give_back(cotangents).wait()
    grads = [torch.zeros_like(weight) for weight in weights]
    for grad, more in zip(grads, came, strict=True):
        lending.add(grad, more)
    pairs = (zip(guests, cotangents, strict=True), zip(weights, grads, strict=True))
    out, home = (sum((left * right).sum().item() for left, right in pair) for pair in pairs)
    return out, home


def _lend_and_return(dtype: torch.dtype) -> tuple[Any, Any]:
    peers = Peers.of(dist.group.WORLD)
    ids = PLACEMENT.experts_of(peers.rank).tolist()
    lending = Lending.of(LOANS, PLACEMENT.experts_of(peers.rank).tolist(), peers)
    (visiting,) = lending.fetch([torch.tensor([[float(e)] * 2 for e in ids], dtype=dtype)]).wait()
    assert len(visiting) == len(visitors(LOANS, peers.rank)) == lending.guests
    (came,) = lending.give_back([torch.full_like(visiting, 10.0 * (peers.rank + 1))]).wait()
    grad = torch.ones(len(ids), 2, dtype=dtype)
    lending.add(grad, came)
    return visiting.tolist(), grad.tolist()


def _small_returns() -> Any:
    peers = Peers.of(dist.group.WORLD)
    ids = [0] if peers.rank == 0 else []
    lending = Lending.of([Loan(expert=0, lender=0, borrower=borrower) for borrower in (1, 2)], ids, peers)
    grad = torch.full((1 if peers.rank == 0 else 0, 1), 256.0, dtype=torch.bfloat16)
    (came,) = lending.give_back([torch.ones(lending.guests, 1, dtype=torch.bfloat16)]).wait()
    lending.add(grad, came)
    return grad.tolist()


def test_copies_end_with_one_gradient_to_the_bit(world: Worlds) -> None:
    copies = Placement(expert_RS=np.array([[0, 1], [1, 2], [0, 1]]))
    answers = world(3).run(_tie, copies)
    assert answers[0][0] == answers[2][0]
    assert answers[0][1] == answers[1][0] == answers[2][1]
    assert torch.tensor(answers[0][0]).allclose(torch.tensor(answers[0][2][0]) + torch.tensor(answers[2][2][0]))


def _tie(placement: Placement) -> Any:
    peers = Peers.of(dist.group.WORLD)
    weight = torch.zeros(len(placement.experts_of(peers.rank)), 3, requires_grad=True)
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(peers.rank))
    (own,) = tie([weight], placement.experts_of(peers.rank).tolist(), placement, peers)
    (own * pull).sum().backward()
    assert weight.grad is not None
    return [*weight.grad.tolist(), pull.tolist()]


def test_sum_over_adds_tensors_of_mixed_types_in_place(world: Worlds) -> None:
    for total in world(3).run(_sum):
        assert total == ([3.0, 3.0], 3)


def _sum() -> Any:
    tensors: list[Tensor] = [torch.arange(2.0) + 1 - torch.arange(2.0), torch.tensor(1)]
    sum_over(tensors, Peers.of(dist.group.WORLD))
    return tensors[0].tolist(), tensors[1].item()


def test_a_rank_that_raises_is_named_and_the_next_run_works() -> None:
    with World(2) as two:
        with pytest.raises(WorldError, match=r"(?s)rank 1 of 2.*ZeroDivisionError"):
            two.run(_fail_on, 1)
        assert two.run(_rank) == [0, 1]


def _fail_on(rank: int) -> int:
    return 1 // (dist.get_rank() - rank) if dist.get_rank() == rank else rank


def _rank() -> int:
    return dist.get_rank()
