"""Fixed: a rank's index record of shapes that do not depend on what was routed, made on the device.

Letters here: N rows this rank chose; P rows of room in a message to one rank; X = ranks * P rows of messages; M rows of
room at the experts; V experts of room for one lender's visitors. What has no row holds any, is computed by nobody, and
is masked where it could be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from placement import Placement
from routing import Choice, flow_on_device


class Room(NamedTuple):
    """Of one rank. pair: P. rows: M. visits: V. own: the experts at home there."""

    pair: int
    rows: int
    visits: int
    own: int


class Homes(NamedTuple):
    """Where experts live, on the device. expert_RS: -1 where a rank has fewer."""

    home_E: Tensor
    slot_E: Tensor
    expert_RS: Tensor

    @classmethod
    def of(cls, placement: Placement, device: torch.device) -> Self:
        expert_RS = torch.full((placement.ranks, max(len(homed) for homed in placement.homed_R)), -1)
        slot_E = torch.zeros(placement.num_experts, dtype=torch.int64)
        for rank in range(placement.ranks):
            ids = torch.from_numpy(placement.experts_of(rank).copy()).long()
            expert_RS[rank, : len(ids)] = ids
            slot_E[ids] = torch.arange(len(ids))
        home_E = torch.from_numpy(placement.home_E.copy()).long()
        return cls(home_E.to(device), slot_E.to(device), expert_RS.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Fixed:
    """token_X: whose row each place of the outgoing messages holds. place_N: where each row lies in them; fits_N: is it
    there? index_M: which incoming rows are computed, sorted by expert; slot_M: by which; live_M: is it a row at all?
    end_A: where each active expert's rows end, int32; row_A: how many. home_X: where each incoming row is among M.
    pick_W: the own experts that visit others, V for each rank. over: does anything not fit, on any rank?"""

    token_X: Tensor
    place_N: Tensor
    fits_N: Tensor
    index_M: Tensor
    slot_M: Tensor
    live_M: Tensor
    row_A: Tensor
    end_A: Tensor
    home_X: Tensor
    pick_W: Tensor
    over: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, choice: Choice, count_RE: Tensor, quota_RE: Tensor, homes: Homes, room: Room, rank: int) -> Self:
        flow_SDE = flow_on_device(count_RE, quota_RE)
        visit_RE = (quota_RE > 0) & (homes.home_E != torch.arange(len(count_RE), device=count_RE.device)[:, None])
        token_X, place_N, fits_N = _leaving(choice, count_RE[rank], flow_SDE[rank], room, rank)
        active_E, pick_W = _active(visit_RE, homes, room, rank), _lent(visit_RE, homes, room, rank)
        slot_X = _arriving(flow_SDE[:, rank], active_E, room)
        order_X = slot_X.argsort(stable=True)
        index_M, home_X = order_X[: room.rows], torch.empty_like(order_X)
        home_X.scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
        slot_M, active = slot_X[index_M], room.own + len(count_RE) * room.visits
        row_A = slot_M.new_zeros(active + 1).scatter_add_(0, slot_M, torch.ones_like(slot_M))[:active]
        pair_RR = visit_RE.new_zeros(visit_RE.shape[0], visit_RE.shape[0], dtype=torch.int64)
        pair_RR.scatter_add_(1, homes.home_E.expand_as(visit_RE), visit_RE.long())
        over = (flow_SDE.sum(dim=2) > room.pair).any() | (quota_RE.sum(dim=1) > room.rows).any()
        return cls(
            token_X=token_X,
            place_N=place_N,
            fits_N=fits_N,
            index_M=index_M,
            slot_M=slot_M.clamp(max=active - 1),
            live_M=slot_M < active,
            row_A=row_A,
            end_A=row_A.cumsum(0).to(torch.int32),
            home_X=home_X.clamp(max=len(index_M) - 1),
            pick_W=pick_W,
            over=over | (pair_RR > room.visits).any(),
        )


def _leaving(choice: Choice, count_E: Tensor, flow_DE: Tensor, room: Room, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row to its destination, own rank first, then by destination: the order in which the flow was cut."""
    expert_N, ranks = choice.expert_N, len(flow_DE)
    line_N = torch.arange(len(expert_N), device=expert_N.device)
    by_expert_N = expert_N.argsort(stable=True)  # rows that go nowhere come first
    sorted_N = expert_N[by_expert_N]
    known_N = sorted_N.clamp(min=0)
    first_E = count_E.cumsum(0) - count_E + (len(expert_N) - count_E.sum())
    cut_DE = torch.cat([flow_DE[rank : rank + 1], flow_DE[:rank], flow_DE[rank + 1 :]]).cumsum(dim=0)
    turn_N = (cut_DE[:, known_N] <= line_N - first_E[known_N]).sum(dim=0)
    to_N = torch.where(turn_N == 0, rank, torch.where(turn_N <= rank, turn_N - 1, turn_N))
    to_N = torch.where(sorted_N < 0, ranks, to_N)
    by_rank_N = to_N.argsort(stable=True)
    send_D = flow_DE.sum(dim=1)
    start_D = torch.cat([send_D.cumsum(0) - send_D, send_D.sum()[None]])
    at_N = torch.empty_like(line_N).scatter_(0, by_rank_N, line_N) - start_D[to_N]
    fits_N = (to_N < ranks) & (at_N < room.pair)
    place_N = torch.where(fits_N, to_N * room.pair + at_N, ranks * room.pair)
    token_X = place_N.new_zeros(ranks * room.pair + 1).scatter_(0, place_N, choice.token_N[by_expert_N])[:-1]
    back_N = torch.empty_like(by_expert_N).scatter_(0, by_expert_N, line_N)
    return token_X, place_N[back_N].clamp(max=ranks * room.pair - 1), fits_N[back_N]


def _active(visit_RE: Tensor, homes: Homes, room: Room, rank: int) -> Tensor:
    """Which of the active experts here each expert is: own ones by slot, visitors by lender and slot; one past the last
    for those that are not here, and for no expert at all. -> [E + 1]"""
    active = room.own + len(visit_RE) * room.visits
    visit_LS = visit_RE[rank][homes.expert_RS.clamp(min=0)] & (homes.expert_RS >= 0)
    turn_LS = visit_LS.cumsum(dim=1) - 1
    turn_E = turn_LS[homes.home_E, homes.slot_E]
    visitor_E = torch.where(
        visit_RE[rank] & (turn_E < room.visits), room.own + homes.home_E * room.visits + turn_E, active
    )
    active_E = torch.where(homes.home_E == rank, homes.slot_E, visitor_E)
    return torch.cat([active_E, active_E.new_full((1,), active)])


def _lent(visit_RE: Tensor, homes: Homes, room: Room, rank: int) -> Tensor:
    """The slots of this rank that visit each other rank, in their order; then any, to fill the room."""
    mine_S = homes.expert_RS[rank]
    visit_RS = visit_RE[:, mine_S.clamp(min=0)] & (mine_S >= 0)
    pick_RV = (~visit_RS).long().argsort(dim=1, stable=True)[:, : room.visits]
    return pick_RV.clamp(max=room.own - 1).flatten()


def _arriving(flow_SE: Tensor, active_E: Tensor, room: Room) -> Tensor:
    """Which active expert each incoming row is for: a message is sorted by expert. -> slot_X"""
    end_SE = flow_SE.cumsum(dim=1)
    line_SP = torch.arange(room.pair, device=flow_SE.device).expand(len(flow_SE), -1).contiguous()
    return active_E[torch.searchsorted(end_SE, line_SP, right=True)].flatten()
