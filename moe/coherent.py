"""Context-coherent inference, after ExFlow: a token stays on the rank of its last expert instead of coming home.

Attention needs a token's whole context where the token is, so every rank keeps the context of every sequence; what a
step adds to it, the keys and values of its new tokens in all layers, is gathered once at the end of the step.

    rank_T = ...                                            # where each token of the step is, known to all ranks
    for layer in layers:
        x_TD = x_TD + attention(norm_in(x_TD), context)     # of the tokens that are here
        x_TD, rank_T, traffic = follow(layer.moe, x_TD, rank_T, pinned_T, norm_out)
    context = gather_context(...)

With one expert a token, a layer is one all-to-all instead of two: the token moves with its residual, and the expert's
result is added where it is made. With several, it lives on the rank that has most of its experts, of equals the one
whose expert is heavier; what other ranks make of it is added up there and follows in a second all-to-all, left out in
layers where no token on any rank has need of it. Every rank decides all this for all tokens from one small table, and
so tells nobody where a row goes.

What it saves is messages and rows of tokens; bytes it saves only where the context is narrow. With keys and values w
times as wide as a token, R ranks and k experts a token, the context is R w / 2k times the bytes that tokens cross with
otherwise: w = 2, as without shared heads, never pays; w = 1/4 may.

Two tokens of one sequence in one step, as when a prompt is read, must see each other in every layer: pin them, and they
come home as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.batch import header, problem_of, raise_alike
from moe.comm import Peers, exchange, gather_counts, gather_rows
from moe.dispatch import upload
from moe.guests import Nobody
from moe.layer import MoE
from moe.trip import Stay
from placement import Placement
from routing import Assignment, Choice

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Hop(NamedTuple):
    """One layer's decisions for all tokens of a step, alike on every rank.

    here_T: where each token is. rank_TK: who runs each of its experts. next_T: where it goes on.
    """

    expert_TK: IntArray
    here_T: IntArray
    rank_TK: IntArray
    next_T: IntArray

    def visits_TR(self, ranks: int) -> BoolArray:
        """Whether a token has an expert on a rank."""
        visits: BoolArray = (self.rank_TK[:, :, None] == np.arange(ranks)).any(axis=1)
        return visits

    def assignment(self, placement: Placement) -> Assignment:
        count_RE, quota_RE = np.zeros((2, placement.ranks, placement.num_experts), dtype=np.int64)
        np.add.at(count_RE, (self.here_T[:, None], self.expert_TK), 1)
        np.add.at(quota_RE, (self.rank_TK, self.expert_TK), 1)
        return Assignment(count_RE=count_RE, quota_RE=quota_RE)


def hop(expert_TK: IntArray, here_T: IntArray, pinned_T: BoolArray, placement: Placement) -> Hop:
    """An expert runs where the token is, if a copy is there, else at home. expert_TK: heaviest first."""
    at_hand_TK = placement.held_RE[here_T[:, None], expert_TK]
    rank_TK = np.where(at_hand_TK, here_T[:, None], placement.home_E[expert_TK])
    votes_TK = (rank_TK[:, :, None] == rank_TK[:, None, :]).sum(axis=2)
    most_T = np.take_along_axis(rank_TK, votes_TK.argmax(axis=1, keepdims=True), axis=1)[:, 0]
    return Hop(expert_TK, here_T, rank_TK, np.where(pinned_T, here_T, most_T))


class Traffic(NamedTuple):
    """What crossed between ranks, on all of them together. Tables of whole numbers, which all ways gather, are left
    out."""

    exchanges: int
    rows: int
    bytes: int

    def __add__(self, other: object) -> Traffic:
        assert isinstance(other, Traffic)
        return Traffic(*(mine + more for mine, more in zip(self, other, strict=True)))


class Followed(NamedTuple):
    """x_TD: the tokens that are here now, in the order of all tokens."""

    x_TD: Tensor
    rank_T: IntArray
    traffic: Traffic


@torch.no_grad()
def follow(
    layer: MoE, x_TD: Tensor, rank_T: IntArray, pinned_T: BoolArray, norm: Callable[[Tensor], Tensor]
) -> Followed:
    """x + layer(norm(x)), and each token moves to where most of its experts are, but for those that are pinned.

    x_TD: the tokens that are here, in the order of all tokens. rank_T, pinned_T: of all tokens of the step, alike on
    every rank. norm: row by row; it is taken again where a token arrives, so that it need not travel.

    A copy of an expert is used where the token is; the layer's assigner is not asked. Who observes the layer hears of
    each choice where the token is at that time: counts are right, but a Recorder would follow other tokens from layer
    to layer.
    """
    peers, placement = layer.peers, layer.placement
    choice, expert_TK = _agreed(layer, x_TD, rank_T, norm)
    step = hop(expert_TK, rank_T, pinned_T, placement)
    layer._observe(choice, step.assignment(placement))
    present, tokens, visits_TR = _gone(x_TD, choice, step, peers)
    x_PD, weight_PK = present
    norm_PD = norm(x_PD)
    index_M, place_PK, rows_A = _rows(step, tokens, layer.experts.expert_ids, peers.rank, x_TD.device)
    out_MD = layer.experts(norm_PD[index_M], None, Stay(rows_A=rows_A), layer._weights(), Nobody())
    part_PD = _added(out_MD, place_PK, weight_PK)
    strays_TR = visits_TR & (np.arange(peers.size) != step.next_T[:, None])
    (stay_P,) = upload([np.flatnonzero(step.next_T[tokens] == peers.rank)], x_TD.device)
    y_TD = part_PD[stay_P]
    if strays_TR.any():
        y_TD = y_TD + _strays(part_PD, tokens, strays_TR, step.next_T, peers)
    y_TD = y_TD.to(x_TD.dtype)
    if layer.shared is not None:
        y_TD = y_TD + layer.shared(norm_PD[stay_P])
    gone, strays = int(visits_TR.sum() - visits_TR[np.arange(len(rank_T)), rank_T].sum()), int(strays_TR.sum())
    width = x_TD.shape[1] * x_TD.itemsize
    traffic = Traffic(
        exchanges=1 + bool(strays),
        rows=gone + strays,
        bytes=gone * (width + expert_TK.shape[1] * weight_PK.itemsize) + strays * width,
    )
    return Followed(x_PD[stay_P] + y_TD, step.next_T, traffic)


def gather_context(
    row_LND: Sequence[Tensor], rank_LT: Sequence[IntArray], peers: Peers
) -> tuple[list[Tensor], Traffic]:
    """What each layer made of the tokens that were there, on every rank, in one message for all layers.

    row_LND: this rank's rows of each layer. rank_LT: where the tokens were in it. -> rows of all tokens, by layer
    """
    count_LR = np.stack([np.bincount(rank_T, minlength=peers.size) for rank_T in rank_LT])
    count_R = count_LR.sum(axis=0)
    every = gather_rows(torch.cat(list(row_LND)), count_R.tolist(), peers)
    start_LR = (count_R.cumsum() - count_R) + count_LR.cumsum(axis=0) - count_LR
    place_LT = []
    for rank_T, start_R, size_R in zip(rank_LT, start_LR, count_LR, strict=True):
        place_T = np.empty_like(rank_T)
        place_T[rank_T.argsort(kind="stable")] = np.concatenate(
            [np.arange(start, start + size) for start, size in zip(start_R, size_R, strict=True)]
        )
        place_LT.append(place_T)
    width = every.shape[1:].numel() * every.itemsize
    rows = int(count_R.max()) * peers.size * (peers.size - 1)
    traffic = Traffic(exchanges=1, rows=rows, bytes=rows * width)
    return [every[place_T] for place_T in upload(place_LT, every.device)], traffic


def _agreed(layer: MoE, x_TD: Tensor, rank_T: IntArray, norm: Callable[[Tensor], Tensor]) -> tuple[Choice, IntArray]:
    """What the tokens here chose, and what every token did: the one host synchronisation of a layer. A rank that cannot
    choose, whatever the reason, says so there, so that nobody waits for it."""
    peers, price_E = layer.peers, layer.router.price_E
    mine = np.flatnonzero(rank_T == peers.rank)
    told_TK = torch.zeros(len(rank_T), layer.router.top_k, dtype=torch.int64, device=price_E.device)
    choice: Choice | None = None
    problem: Exception | None = None
    try:
        choice = _chosen(layer, norm(x_TD), len(mine), told_TK.shape)
        (mine_T,) = upload([mine], price_E.device)
        told_TK[mine_T] = choice.expert_TK
    except Exception as error:
        choice, problem = None, error
    flags_F = header(choice, None, False, price_E)[layer.config.num_experts :]
    table = gather_counts(torch.cat([told_TK.reshape(-1), flags_F]), peers)
    try:
        raise_alike(table[:, told_TK.numel() :], problem, peers.rank)
    finally:
        del problem
    assert choice is not None
    expert_TK: IntArray = table[:, : told_TK.numel()].sum(axis=0).reshape(told_TK.shape)
    if len(expert_TK) and expert_TK.min() < 0:
        raise ValueError("following experts needs a router that drops no rows; build the model with drop=Dropless()")
    return choice, expert_TK


def _chosen(layer: MoE, x_TD: Tensor, here: int, shape: Sequence[int]) -> Choice:
    """here: tokens that are to be on this rank. shape: tokens of the step, experts of each."""
    tokens, top_k = shape
    if (problem := problem_of(x_TD, None, None, layer.config.dim, layer.experts.stack().up)) is not None:
        raise ValueError(problem)
    if len(x_TD) != here:
        raise ValueError(f"{len(x_TD)} tokens came; rank_T says that {here} of {tokens} are here")
    choice: Choice = layer.router(x_TD)
    if choice.top_k != top_k:
        raise ValueError("following experts needs a router that gives every token top_k of them, as TopK")
    return choice


def _gone(x_TD: Tensor, choice: Choice, step: Hop, peers: Peers) -> tuple[tuple[Tensor, Tensor], IntArray, BoolArray]:
    """Tokens go to the ranks of their experts, once to each. -> (x, weights) of those present here; which; visits"""
    rank, others = peers.rank, np.arange(peers.size) != peers.rank
    visits_TR = step.visits_TR(peers.size)
    mine = np.flatnonzero(step.here_T == rank)
    going_R, going = np.nonzero(visits_TR[mine].T & others[:, None])
    coming = visits_TR[:, rank] & (step.here_T != rank)
    recv_R = np.bincount(step.here_T[coming], minlength=peers.size)
    arrived = np.flatnonzero(coming)[step.here_T[coming].argsort(kind="stable")]
    kept = np.flatnonzero(visits_TR[mine, rank] | (step.next_T[mine] == rank))
    ids = np.concatenate([mine[kept], arrived])
    order = ids.argsort(kind="stable")
    going_G, kept_O, order_P = upload([going, kept, order], x_TD.device)
    packed = _bytes(x_TD, choice.weight_N.view(-1, step.expert_TK.shape[1]))
    send_R = np.bincount(going_R, minlength=peers.size)
    guests = exchange(packed[going_G], send_R.tolist(), recv_R.tolist(), peers)
    width = x_TD.shape[1] * x_TD.itemsize
    present_PB = torch.cat([packed[kept_O], guests])[order_P]
    x_PD = present_PB[:, :width].contiguous().view(x_TD.dtype)
    weight_PK = present_PB[:, width:].contiguous().view(choice.weight_N.dtype)
    return (x_PD, weight_PK), ids[order], visits_TR


def _rows(
    step: Hop, tokens: IntArray, expert_ids: Sequence[int], rank: int, device: torch.device
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """What this rank's experts have to do. -> index_M: the present token of each row, sorted by expert; place_PK: the
    row of each token's k-th expert, M where that is not here; rows_A"""
    at, k = np.nonzero(step.rank_TK[tokens] == rank)
    slot_E = {expert: slot for slot, expert in enumerate(expert_ids)}
    slot_M = np.array([slot_E[expert] for expert in step.expert_TK[tokens[at], k].tolist()], dtype=np.int64)
    order = slot_M.argsort(kind="stable")
    place_PK = np.full((len(tokens), step.rank_TK.shape[1]), len(at), dtype=np.int64)
    place_PK[at[order], k[order]] = np.arange(len(at))
    index_M, place_N = upload([at[order], place_PK.ravel()], device)
    rows_A = np.bincount(slot_M, minlength=len(expert_ids)).tolist()
    return index_M, place_N.view(place_PK.shape), tuple(rows_A)


def _added(out_MD: Tensor, place_PK: Tensor, weight_PK: Tensor) -> Tensor:
    """sum over the experts that are here of weight_k out_k, in the order they were chosen, as wide as the weights."""
    padded = torch.cat([out_MD, out_MD.new_zeros(1, out_MD.shape[1])]).to(weight_PK.dtype)
    part_PD = padded.new_zeros(len(place_PK), padded.shape[1])
    for place_P, weight_P in zip(place_PK.unbind(1), weight_PK.unbind(1), strict=True):
        part_PD = part_PD + weight_P[:, None] * padded[place_P]
    return part_PD


def _strays(part_PD: Tensor, tokens: IntArray, strays_TR: BoolArray, next_T: IntArray, peers: Peers) -> Tensor:
    """What was made of tokens that live elsewhere follows them. -> what other ranks made of those that live here"""
    rank = peers.rank
    leaving = np.flatnonzero(strays_TR[tokens, rank])
    leaving = leaving[next_T[tokens[leaving]].argsort(kind="stable")]
    send_R = np.bincount(next_T[tokens[leaving]], minlength=peers.size)
    source_N, token_N = np.nonzero((strays_TR & (next_T == rank)[:, None]).T)
    recv_R = np.bincount(source_N, minlength=peers.size)
    (leaving_N,) = upload([leaving], part_PD.device)
    row_ND = exchange(part_PD[leaving_N], send_R.tolist(), recv_R.tolist(), peers)
    home = np.flatnonzero(next_T == rank)
    at_N = np.searchsorted(home, token_N)
    turn_N = np.zeros_like(at_N)  # the how-manieth row of its token each is: rows of one turn are of different tokens
    by_token = at_N.argsort(kind="stable")
    count_T = np.bincount(at_N, minlength=len(home))
    turn_N[by_token] = np.arange(len(at_N)) - np.repeat(count_T.cumsum() - count_T, count_T)
    place_JT = np.full((int(count_T.max(initial=0)), len(home)), len(at_N), dtype=np.int64)
    place_JT[turn_N, at_N] = np.arange(len(at_N))
    padded = torch.cat([row_ND, row_ND.new_zeros(1, row_ND.shape[1])])
    y_TD = row_ND.new_zeros(len(home), row_ND.shape[1])
    for place_T in upload(list(place_JT), part_PD.device) if len(place_JT) else ():
        y_TD = y_TD + padded[place_T]
    return y_TD


def _bytes(*parts: Tensor) -> Tensor:
    """Rows of any types side by side, as they lie in memory."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
