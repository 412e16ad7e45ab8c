"""Dispatch: one rank's index record, from the rows that leave to the results that come home.

Letters here: N rows this rank chose (as in Choice); G of them go to other ranks; M rows are computed here; H of these
are guests from other ranks. The M rows are sorted by expert (own experts by slot, then visitors), then by the rank they
come from, then by their order there, so that an expert sees its rows in the same order wherever it is.

Sending and coming home are each other's transpose, so two functions make forward and backward of both:

    _out:  rows -> M     rows leave by `exchange`, rows that stay are copied, all land sorted by expert
    _back: M -> N        results go back the same way, and land in the order in which they were chosen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.comm import Peers, exchange
from routing import Assignment, Choice, at_least_fp32

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatch:
    """row_G: which chosen rows go, in the order they leave. row_O: which stay, and place_O: where they are computed.
    place_H: where each guest is computed, in the order they arrive. rows_A: rows of each active expert."""

    token_N: Tensor
    row_G: Tensor
    row_O: Tensor
    place_O: Tensor
    place_H: Tensor
    send_R: tuple[int, ...]
    recv_R: tuple[int, ...]
    rows_A: tuple[int, ...]
    num_tokens: int
    top_k: int | None
    peers: Peers

    @property
    def num_rows(self) -> int:
        """M: the rows computed here."""
        return sum(self.rows_A)

    @classmethod
    def of(cls, choice: Choice, assignment: Assignment, active: Sequence[int], peers: Peers) -> Self:
        """active: the experts this rank computes, in order. Tables are made on the host, indices on the device."""
        sent_RE, recv_RE = assignment.sent_by(peers.rank), assignment.received_by(peers.rank)
        count_E = assignment.count_RE[peers.rank]
        segments, recv_AR = _segments(sent_RE, recv_RE, count_E, active, peers.rank)
        nowhere = choice.token_N.numel() - int(count_E.sum())  # such rows sort before expert 0
        by_expert_N = choice.expert_N.argsort(stable=True)
        go, stay, place_stay, place_guest = _spread(segments, choice.token_N.device)
        others = np.arange(peers.size) != peers.rank
        return cls(
            token_N=choice.token_N,
            row_G=by_expert_N[go + nowhere],
            row_O=by_expert_N[stay + nowhere],
            place_O=place_stay,
            place_H=place_guest,
            send_R=tuple((sent_RE.sum(axis=1) * others).tolist()),
            recv_R=tuple((recv_RE.sum(axis=1) * others).tolist()),
            rows_A=tuple(recv_AR.sum(axis=1).tolist()),
            num_tokens=choice.num_tokens,
            top_k=choice.top_k,
            peers=peers,
        )

    def send(self, x_TD: Tensor) -> Tensor:
        """Every token to its experts. -> row_MD, sorted by expert"""
        row_MD: Tensor = _Send.apply(x_TD, self)  # type: ignore[no-untyped-call]
        return row_MD

    def home(self, out_MD: Tensor, weight_N: Tensor) -> Tensor:
        """Every result to its token, weighted and summed. -> y_TD, zero for tokens that went nowhere"""
        y_TD: Tensor = _Home.apply(out_MD, weight_N, self)  # type: ignore[no-untyped-call]
        return y_TD


class _Send(torch.autograd.Function):
    """forward:   row_m = x_t          for the row m of each choice n = (t, e)
    backward:  dx_t = sum over n of t of drow_m
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return _out(x_TD, dispatch.token_N[dispatch.row_G], dispatch.token_N[dispatch.row_O], dispatch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drow_MD: Tensor) -> tuple[Tensor, None]:
        return _sum_by_token(_back(drow_MD, ctx.dispatch), None, ctx.dispatch).to(drow_MD.dtype), None


class _Home(torch.autograd.Function):
    """forward:   y_t = sum over n of t of w_n out_m
    backward:  dout_m = w_n dy_t,  dw_n = <dy_t, out_m>
    """

    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, weight_N: Tensor, dispatch: Dispatch) -> Tensor:
        out_ND = _back(out_MD, dispatch)
        ctx.dispatch = dispatch
        ctx.save_for_backward(out_ND, weight_N)
        return _sum_by_token(out_ND, weight_N, dispatch).to(out_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        out_ND, weight_N = ctx.saved_tensors
        dy_ND = dy_TD[dispatch.token_N].to(at_least_fp32(dy_TD.dtype))
        dweight_N = (dy_ND * out_ND).sum(dim=-1).to(weight_N.dtype)
        dout_ND = (dy_ND * weight_N[:, None]).to(out_ND.dtype)
        return _out(dout_ND, dispatch.row_G, dispatch.row_O, dispatch), dweight_N, None


def _out(source: Tensor, index_G: Tensor, index_O: Tensor, dispatch: Dispatch) -> Tensor:
    guest_HD = exchange(source.index_select(0, index_G), dispatch.send_R, dispatch.recv_R, dispatch.peers)
    row_MD = source.new_empty(dispatch.num_rows, source.shape[1])
    row_MD.index_copy_(0, dispatch.place_O, source.index_select(0, index_O))
    return row_MD.index_copy_(0, dispatch.place_H, guest_HD)


def _back(row_MD: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows that went nowhere are zero."""
    guest_HD = row_MD.index_select(0, dispatch.place_H)
    home_GD = exchange(guest_HD, dispatch.recv_R, dispatch.send_R, dispatch.peers)
    row_ND = row_MD.new_zeros(len(dispatch.token_N), row_MD.shape[1])
    row_ND.index_copy_(0, dispatch.row_O, row_MD.index_select(0, dispatch.place_O))
    return row_ND.index_copy_(0, dispatch.row_G, home_GD)


def _sum_by_token(row_ND: Tensor, weight_N: Tensor | None, dispatch: Dispatch) -> Tensor:
    """The (weighted) rows of each token, added in fp32 or better in the order they were chosen: the same to the bit
    whichever rank computed them."""
    sum_TD = row_ND.new_zeros(dispatch.num_tokens, row_ND.shape[1], dtype=at_least_fp32(row_ND.dtype))
    if dispatch.top_k is None:
        row_ND = row_ND.to(sum_TD.dtype) if weight_N is None else row_ND * weight_N[:, None]
        return sum_TD.index_add_(0, dispatch.token_N, row_ND)
    for choice in range(dispatch.top_k):
        row_TD = row_ND[choice :: dispatch.top_k]
        sum_TD += row_TD if weight_N is None else row_TD * weight_N[choice :: dispatch.top_k, None]
    return sum_TD


def upload(arrays: Sequence[Sequence[int] | IntArray], device: torch.device) -> list[Tensor]:
    """Whole numbers to the device in one copy, which the host does not wait for."""
    whole: list[IntArray] = [np.asarray(array, dtype=np.int64) for array in arrays]
    flat = torch.from_numpy(np.concatenate(whole))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return list(torch.split(flat.to(device), [len(array) for array in arrays]))


def _segments(
    sent_RE: IntArray, recv_RE: IntArray, count_E: IntArray, active: Sequence[int], rank: int
) -> tuple[list[tuple[IntArray, IntArray]], IntArray]:
    """Each index this rank needs, as (start, length) of runs of neighbours: of the rows that go and of those that stay,
    among this rank's rows sorted by expert; of where the stayers and the guests go, among the rows computed here."""
    others = np.arange(len(sent_RE)) != rank
    first_E: IntArray = count_E.cumsum() - count_E
    stay_E = sent_RE[rank]
    go_RE = sent_RE * others[:, None]
    go_start_RE = first_E + stay_E + go_RE.cumsum(axis=0) - go_RE
    recv_AR = recv_RE.T[list(active)]
    place_AR = (recv_AR.ravel().cumsum() - recv_AR.ravel()).reshape(recv_AR.shape)
    place_RE = np.zeros_like(recv_RE)
    place_RE[:, list(active)] = place_AR.T
    segments = [
        (go_start_RE[others].ravel(), go_RE[others].ravel()),
        (first_E, stay_E),
        (place_RE[rank], stay_E),
        (place_RE[others].ravel(), recv_RE[others].ravel()),
    ]
    return segments, recv_AR


def _spread(segments: Sequence[tuple[IntArray, IntArray]], device: torch.device) -> list[Tensor]:
    """(start, length) of each run -> start, start + 1, ..., start + length - 1 of all runs, on the device."""
    tables: list[IntArray] = []
    for start, length in segments:
        kept = np.flatnonzero(length)
        start, length = start[kept], length[kept]  # noqa: PLW2901
        before: IntArray = length.cumsum() - length
        tables += [start - before, length]
    shift_and_length = upload(tables, device)
    totals = [int(length.sum()) for _, length in segments]
    return [
        shift.repeat_interleave(length, output_size=total) + torch.arange(total, device=device)
        for shift, length, total in zip(shift_and_length[::2], shift_and_length[1::2], totals)
    ]
