"""exchange: rows to the ranks that need them. The one way in which tokens, weights and gradients travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.comm.group import Peers, reaching_peers
from moe.comm.unseen import unseen


def exchange(row_ND: Tensor, send_R: Sequence[int], recv_R: Sequence[int], peers: Peers) -> Tensor:
    """The first send_R[0] rows go to rank 0, the next send_R[1] to rank 1, ...; recv_R[r] rows come from rank r.

    row_ND: [sum(send_R), ...] -> [sum(recv_R), ...], in the order of the ranks they come from. Any type; real floating
    types are differentiable. Zero rows are a legal size, and every rank must call.
    """
    if len(row_ND) != sum(send_R):
        raise ValueError(f"{len(row_ND)} rows, but send_R={list(send_R)} sends {sum(send_R)}")
    if not row_ND.is_floating_point() or not torch.is_grad_enabled():
        return _swap(row_ND, send_R, recv_R, peers)
    row_MD: Tensor = _Exchange.apply(row_ND, send_R, recv_R, peers)  # type: ignore[no-untyped-call]
    return row_MD


def exchange_into(row_ND: Tensor, send_R: Sequence[int], recv_R: Sequence[int], row_MD: Tensor, peers: Peers) -> None:
    """As exchange, without gradients, and the rows arrive in row_MD, which lies in one piece."""
    if peers.group is None:
        row_MD.copy_(row_ND)
        return
    target, source = _bytes_of(row_MD), _bytes_of(row_ND.contiguous())
    with reaching_peers():
        dist.all_to_all_single(target, source, list(recv_R), list(send_R), group=peers.group)


def gather_rows(row_ND: Tensor, count_R: Sequence[int], peers: Peers) -> Tensor:
    """Every rank's rows on every rank: count_R[r] from rank r, in the order of the ranks. Not differentiable.

    Messages are as long as the longest: the backends want them equal.
    """
    if len(row_ND) != count_R[peers.rank]:
        raise ValueError(f"{len(row_ND)} rows, but count_R={list(count_R)} says {count_R[peers.rank]} of this rank")
    if peers.group is None:
        return row_ND.clone()
    longest = max(count_R)
    padded = row_ND.new_zeros(longest, *row_ND.shape[1:])
    padded[: len(row_ND)] = row_ND
    every = [torch.empty_like(padded) for _ in count_R]
    dist.all_gather(every, padded, group=peers.group)
    return torch.cat([rows[:count] for rows, count in zip(every, count_R, strict=True)])


class _Exchange(torch.autograd.Function):
    """forward:   y = P x      P permutes the rows of all ranks together
    backward:  dx = P^T dy  the same all-to-all with its splits swapped
    """

    @staticmethod
    def forward(ctx: Any, row_ND: Tensor, send_R: Sequence[int], recv_R: Sequence[int], peers: Peers) -> Tensor:
        ctx.send_R, ctx.recv_R, ctx.peers = send_R, recv_R, peers
        return _swap(row_ND, send_R, recv_R, peers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drow_MD: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(drow_MD, ctx.recv_R, ctx.send_R, ctx.peers), None, None, None


class Arriving:
    """Rows on their way. wait() -> the rows, once they may be read; until then the sender keeps what it sends."""

    def __init__(self, row_MD: Tensor, source: Tensor, work: dist.Work | None) -> None:
        self._row_MD, self._source, self._work = row_MD, source, work

    def wait(self) -> Tensor:
        if self._work is not None:
            with reaching_peers():
                self._work.wait()
        return self._row_MD


def exchange_later(row_ND: Tensor, send_R: Sequence[int], recv_R: Sequence[int], peers: Peers) -> Arriving:
    """As exchange, without gradients, and this rank goes on while the rows travel."""
    if peers.group is None:
        return Arriving(row_ND, row_ND, None)
    with reaching_peers(), unseen():
        row_MD, source = _room(row_ND, recv_R), row_ND.contiguous()
        target, sent = _bytes_of(row_MD), _bytes_of(source)
        work = dist.all_to_all_single(target, sent, list(recv_R), list(send_R), group=peers.group, async_op=True)
    return Arriving(row_MD, source, work)


def _swap(row_ND: Tensor, send_R: Sequence[int], recv_R: Sequence[int], peers: Peers) -> Tensor:
    if peers.group is None:
        return row_ND.clone()
    with unseen():
        row_MD = _room(row_ND, recv_R)
        exchange_into(row_ND, send_R, recv_R, row_MD, peers)
    return row_MD


def _room(row_ND: Tensor, recv_R: Sequence[int]) -> Tensor:
    """For the rows to come."""
    return row_ND.new_empty(sum(recv_R), *row_ND.shape[1:])


def _bytes_of(row_XD: Tensor) -> Tensor:
    """What travels in the rows' stead where their type does not: no backend reduces fp8, but all carry bytes."""
    return row_XD.view(torch.uint8) if row_XD.is_floating_point() and row_XD.element_size() == 1 else row_XD
