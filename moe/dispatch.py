"""Dispatch: one rank's index record, from the rows that leave to the results that come home.

Letters here: N rows this rank chose (as in Choice); G of them go to other ranks; M rows are computed here; H of these
are guests from other ranks. The M rows are sorted by expert (own experts by slot, then visitors), then by the rank they
come from, then by their order there, so that an expert sees its rows in the same order wherever it is.

Going and coming are each other's transpose, so they make forward and backward of both tokens and results:

    go:            tokens that leave are sent; those that stay are picked from where they are, never sent to oneself
    come, total:   what was made of guests goes back; each token adds up its rows, wherever they were computed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moe.blocks import total
from moe.comm import Peers, exchange, exchange_into
from moe.trip import Add
from routing import Assignment, Choice, at_least_fp32

IntArray = NDArray[np.int64]
_FEW = 4096


def add_rows(row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """An Add, in C++ or in torch."""
    if (y_TD := total(row_XD, place_TK, weight_TK)) is not None:
        return y_TD
    if weight_TK is None or weight_TK.dtype == row_XD.dtype:
        return F.embedding_bag(place_TK, row_XD, per_sample_weights=weight_TK, mode="sum")
    return _weighted_total(row_XD, place_TK, weight_TK)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatch:
    """row_G: which chosen rows go, in the order they leave. row_O: which stay, and place_O: where they are computed.
    place_H: where each guest is computed, in the order they arrive. rows_A: rows of each active expert."""

    token_N: Tensor
    row_G: Tensor
    row_O: Tensor
    place_O: Tensor
    place_H: Tensor
    token_G: Tensor
    index_M: Tensor
    place_N: Tensor
    room: int
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
        if peers.size == 1 and list(active) == sorted(active):
            return cls._alone(choice, assignment.count_RE[0], active, peers)
        sent_RE, recv_RE = assignment.sent_by(peers.rank), assignment.received_by(peers.rank)
        count_E = assignment.count_RE[peers.rank]
        segments, recv_AR = _segments(sent_RE, recv_RE, count_E, active, peers.rank)
        nowhere = choice.token_N.numel() - int(count_E.sum())  # such rows sort before expert 0
        by_expert_N = _by_expert(choice)
        go, stay, place_stay, place_guest = _spread(segments, choice.token_N.device)
        row_G, row_O = by_expert_N[go + nowhere], by_expert_N[stay + nowhere]
        num_rows, tokens, device = int(recv_AR.sum()), choice.num_tokens, choice.token_N.device
        index_M = torch.empty(num_rows, dtype=torch.int64, device=device)
        index_M.index_copy_(0, place_stay, choice.token_N.index_select(0, row_O))
        index_M.index_copy_(0, place_guest, torch.arange(tokens, tokens + len(place_guest), device=device))
        place_N = torch.full_like(choice.token_N, num_rows + len(row_G))
        place_N.index_copy_(0, row_O, place_stay)
        place_N.index_copy_(0, row_G, torch.arange(num_rows, num_rows + len(row_G), device=device))
        others = np.arange(peers.size) != peers.rank
        return cls(
            token_N=choice.token_N,
            row_G=row_G,
            row_O=row_O,
            place_O=place_stay,
            place_H=place_guest,
            token_G=choice.token_N[row_G],
            index_M=index_M,
            place_N=place_N,
            room=len(row_G) + (nowhere > 0),
            send_R=tuple((sent_RE.sum(axis=1) * others).tolist()),
            recv_R=tuple((recv_RE.sum(axis=1) * others).tolist()),
            rows_A=tuple(recv_AR.sum(axis=1).tolist()),
            num_tokens=choice.num_tokens,
            top_k=choice.top_k,
            peers=peers,
        )

    @classmethod
    def _alone(cls, choice: Choice, count_E: IntArray, active: Sequence[int], peers: Peers) -> Self:
        """Of one rank alone, whose experts lie in order: every row stays."""
        by_expert_N, num_rows = _by_expert(choice), int(count_E.sum())
        row_O = by_expert_N[len(by_expert_N) - num_rows :]
        place_O = torch.arange(num_rows, device=row_O.device)
        none = row_O[:0]
        return cls(
            token_N=choice.token_N,
            row_G=none,
            row_O=row_O,
            place_O=place_O,
            place_H=none,
            token_G=none,
            index_M=choice.token_N.index_select(0, row_O),
            place_N=torch.full_like(choice.token_N, num_rows).index_copy_(0, row_O, place_O),
            room=int(num_rows < len(by_expert_N)),
            send_R=(0,),
            recv_R=(0,),
            rows_A=tuple(count_E[list(active)].tolist()),
            num_tokens=choice.num_tokens,
            top_k=choice.top_k,
            peers=peers,
        )

    def go(self, x_TD: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens, with the weights of their choices, to the ranks of their experts. -> rows to pick from, weight_M

        A token that stays is not copied: index_M finds it where it is.
        """
        weight_M = None
        if weight_N is not None:
            weight_M = weight_N.new_empty(self.num_rows)
            weight_M.index_copy_(0, self.place_O, weight_N.index_select(0, self.row_O))
        if self.peers.group is None:
            return x_TD, weight_M
        source_XD, guest_HD = x_TD, x_TD.new_empty(0, x_TD.shape[1])
        if guests := len(self.place_H):
            source_XD = x_TD.new_empty(self.num_tokens + guests, x_TD.shape[1])
            source_XD[: self.num_tokens], guest_HD = x_TD, source_XD[self.num_tokens :]
        leaving_GD = x_TD.index_select(0, self.token_G)
        weight_G = None if weight_N is None else weight_N.index_select(0, self.row_G)
        weight_H = self._swap(leaving_GD, weight_G, guest_HD, outward=True)
        if weight_M is not None and weight_H is not None:
            weight_M.index_copy_(0, self.place_H, weight_H)
        return source_XD, weight_M

    def come(self, row_XD: Tensor | None, scalar_M: Tensor | None) -> Tensor | None:
        """What was made of guests goes back, and what other ranks made comes into the room behind the M rows of row_XD.
        So do the scalars. -> scalar_N, zero for rows that went nowhere"""
        scalar_N = None
        if scalar_M is not None:
            scalar_N = scalar_M.new_zeros(len(self.token_N))
            scalar_N.index_copy_(0, self.row_O, scalar_M.index_select(0, self.place_O))
        if self.peers.group is None:
            if row_XD is not None:
                row_XD[self.num_rows :].zero_()
            return scalar_N
        given = next(tensor for tensor in (row_XD, scalar_M) if tensor is not None)
        end = self.num_rows + len(self.row_G)
        row_HD = given.new_empty(len(self.place_H), 0) if row_XD is None else row_XD.index_select(0, self.place_H)
        home_GD = row_HD.new_empty(len(self.row_G), row_HD.shape[1])
        if row_XD is not None:
            home_GD = row_XD[self.num_rows : end]
        scalar_H = None if scalar_M is None else scalar_M.index_select(0, self.place_H)
        scalar_G = self._swap(row_HD, scalar_H, home_GD, outward=False)
        if row_XD is not None:
            row_XD[end:].zero_()
        if scalar_N is not None and scalar_G is not None:
            scalar_N.index_copy_(0, self.row_G, scalar_G)
        return scalar_N

    def _swap(self, row_XD: Tensor, scalar_X: Tensor | None, into_YD: Tensor, *, outward: bool) -> Tensor | None:
        """Rows to other ranks, or home again, and theirs into a place that is ready. -> the scalars that came along"""
        there, back = (self.send_R, self.recv_R) if outward else (self.recv_R, self.send_R)
        if scalar_X is None:
            exchange_into(row_XD, there, back, into_YD, self.peers)
            return None
        came_YD, scalar_Y = _unpack(exchange(_pack(row_XD, scalar_X), there, back, self.peers), scalar_X)
        into_YD.copy_(came_YD)
        return scalar_Y

    def total(self, row_XD: Tensor, weight_N: Tensor | None, add: Add = add_rows) -> Tensor:
        """The (weighted) rows of each token, added in fp32 or better in the order they were chosen: the same to the bit
        whichever rank computed them. -> y_TD, zero for tokens that went nowhere"""
        if self.top_k is None or not self.token_N.numel():
            row_ND = row_XD.index_select(0, self.place_N).to(at_least_fp32(row_XD.dtype))
            sum_TD = row_ND.new_zeros(self.num_tokens, row_XD.shape[1])
            row_ND = row_ND if weight_N is None else row_ND * weight_N[:, None]
            return sum_TD.index_add_(0, self.token_N, row_ND).to(row_XD.dtype)
        place_TK = self.place_N.view(-1, self.top_k)
        weight_TK = None if weight_N is None else weight_N.view(-1, self.top_k)
        return add(row_XD, place_TK, weight_TK)


def _weighted_total(row_XD: Tensor, place_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """sum over k of weight_tk row_tk where the weights are wider than the rows. On a CPU so few tokens at a time that
    their sums stay in the cache."""
    y_TD = row_XD.new_empty(len(place_TK), row_XD.shape[1])
    step = 256 if row_XD.device.type == "cpu" else max(len(place_TK), 1)
    for start in range(0, len(place_TK), step):
        tokens = slice(start, start + step)
        terms = [
            (row_XD.index_select(0, place_T).to(weight_TK.dtype), weight_T[:, None])
            for place_T, weight_T in zip(place_TK[tokens].unbind(1), weight_TK[tokens].unbind(1))
        ]
        sum_TD = terms[0][0].mul_(terms[0][1])
        for row_TD, weight_T1 in terms[1:]:
            sum_TD.addcmul_(row_TD, weight_T1)
        y_TD[tokens] = sum_TD
    return y_TD


def _pack(row_GD: Tensor, scalar_G: Tensor) -> Tensor:
    """Rows, and a scalar each which may be wider than they are, as one message."""
    return torch.cat([row_GD, scalar_G[:, None].view(row_GD.dtype)], dim=1)


def _unpack(packed_GD: Tensor, scalar: Tensor) -> tuple[Tensor, Tensor]:
    """-> rows, and scalars of the type of this one"""
    width = packed_GD.shape[1] - scalar.itemsize // packed_GD.itemsize
    scalar_G1 = packed_GD[:, width:].clone(memory_format=torch.contiguous_format).view(scalar.dtype)
    return packed_GD[:, :width], scalar_G1.squeeze(1)


def _by_expert(choice: Choice) -> Tensor:
    """The rows in the order of their experts, first those that go nowhere. Short numbers are sorted much sooner."""
    short = choice.num_experts <= torch.iinfo(torch.int16).max
    return (choice.expert_N.to(torch.int16) if short else choice.expert_N).argsort(stable=True)


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
    """(start, length) of each run -> start, start + 1, ..., start + length - 1 of all runs, on the device. Few numbers
    are written out here, of many the runs alone travel."""
    if sum(int(length.sum()) for _, length in segments) <= _FEW:
        return upload([_written_out(start, length) for start, length in segments], device)
    tables: list[IntArray] = []
    for start, length in segments:
        kept = np.flatnonzero(length)
        start, length = start[kept], length[kept]  # noqa: PLW2901
        before: IntArray = length.cumsum() - length
        tables += [start - before, length]
    shift_and_length = upload(tables, device)
    totals = [int(length.sum()) for _, length in segments]
    return [
        shift.repeat_interleave(length, output_size=total) + torch.arange(total, device=device) if total else length
        for shift, length, total in zip(shift_and_length[::2], shift_and_length[1::2], totals)
    ]


def _written_out(start: IntArray, length: IntArray) -> IntArray:
    before: IntArray = length.cumsum() - length
    written: IntArray = np.repeat(start - before, length) + np.arange(int(length.sum()))
    return written
