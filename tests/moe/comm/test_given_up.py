"""A group that was given up closes, whoever still holds its Peers, so that nobody waits for this rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe import World
from moe.comm import Meeting, Peers, PeersLostError, exchange, gather_counts
from moe.comm.standby import store_server

LONGER_THAN_THE_TEST = 3600.0


@pytest.mark.parametrize("holds", ["the peers", "a graph", "an error"])
def test_who_waits_for_a_rank_hears_that_it_gave_up_though_it_holds(world: Callable[[int], World], holds: str) -> None:
    """The third rank waits for the second alone, which is well and has heard elsewhere that a member died."""
    heard_R = world(3).run(_gives_up, holds)
    assert heard_R == [True, True, True]


def _gives_up(holds: str) -> bool:
    rank, size = dist.get_rank(), dist.get_world_size()
    store = store_server("127.0.0.1") if rank == 0 else None
    box = [None if store is None else store.port]
    dist.broadcast_object_list(box, src=0)
    meeting = Meeting(
        store=("127.0.0.1", int(box[0] or 0)),
        here="127.0.0.1",
        device=torch.device("cpu"),
        timeout=LONGER_THAN_THE_TEST,
    )
    peers = meeting.meet(f"{holds}", rank, size)
    x = torch.ones(size, 2, requires_grad=True)
    y = exchange(x, [1] * size, [1] * size, peers)
    held: list[object] = []
    if rank == size - 1:
        with pytest.raises(PeersLostError):
            gather_counts(torch.ones(4, dtype=torch.int64), peers)
        dist.barrier()
        return True
    if holds == "the peers":
        held.append(peers)
    elif holds == "a graph":
        held.append(y)
    else:
        held.append(_failed(peers))
    del x, y
    peers.give_up()
    dist.barrier()
    with pytest.raises(PeersLostError, match="was given up"):
        gather_counts(torch.ones(4, dtype=torch.int64), peers)
    return bool(held)


def _failed(peers: Peers) -> PeersLostError:
    """As Live sees it: the frames that it came through held the group, and a message under way."""
    try:
        _fail(peers)
    except PeersLostError as error:
        error.forget()
        return error
    raise AssertionError("it did not fail")


def _fail(peers: Peers) -> Tensor:
    group = peers.group
    assert group is not None
    work = group.recv([torch.empty(1)], (peers.rank + 1) % (peers.size - 1), 77)
    try:
        raise RuntimeError(f"{work is not None}: a rank died")
    except RuntimeError as error:
        raise PeersLostError(str(error)) from error
