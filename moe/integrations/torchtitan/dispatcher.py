"""Dispatcher: torchtitan's seam for the way of the tokens. Experts stay at home, so its own experts compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torchtitan.models.common.token_dispatcher import BaseEPTokenDispatcher, LocalTokenDispatcher

from moe.comm import Peers, exchange, gather_counts
from moe.dispatch import upload
from routing import at_least_fp32


class Trip(NamedTuple):
    """What combine must know. order_N: the chosen rows, sorted by expert. place_M: where, among the rows that came,
    sorted by rank, each row is found that is computed here, sorted by expert."""

    score_TK: Tensor
    order_N: Tensor
    place_M: Tensor
    send_R: tuple[int, ...]
    recv_R: tuple[int, ...]
    peers: Peers


class Dispatcher(BaseEPTokenDispatcher):  # type: ignore[misc]
    """One all-gather of counts, which the host reads, and an all-to-all each way.

    Results are weighted and added in fp32 or better, in the order in which they were chosen.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):  # type: ignore[misc]
        pass

    def dispatch(
        self, x_TD: Tensor, score_TK: Tensor, expert_TK: Tensor, count_E: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """-> the rows of each expert here, one after the other, how many each has, and what combine must know"""
        if self.ep_mesh is None:
            local: tuple[Tensor, Tensor, Any] = LocalTokenDispatcher.dispatch(self, x_TD, score_TK, expert_TK, count_E)
            return local
        peers = Peers.of(self.ep_mesh)
        count_RE = gather_counts(count_E.to(dtype=expert_TK.dtype), peers)
        slots = self.num_experts // peers.size
        mine_RS = count_RE[:, peers.rank * slots : (peers.rank + 1) * slots]
        start_RS = mine_RS.ravel().cumsum().reshape(mine_RS.shape) - mine_RS
        by_expert = [
            np.arange(start, start + rows) for start, rows in zip(start_RS.T.ravel(), mine_RS.T.ravel(), strict=True)
        ]
        place_M, rows_S = upload([np.concatenate(by_expert), mine_RS.sum(axis=0)], x_TD.device)
        trip = Trip(
            score_TK=score_TK,
            order_N=expert_TK.reshape(-1).argsort(stable=True),
            place_M=place_M,
            send_R=tuple(count_RE[peers.rank].reshape(peers.size, slots).sum(axis=1).tolist()),
            recv_R=tuple(mine_RS.sum(axis=1).tolist()),
            peers=peers,
        )
        row_MD = exchange(x_TD.index_select(0, trip.order_N // self.top_k), trip.send_R, trip.recv_R, peers)
        return row_MD.index_select(0, place_M), rows_S, trip

    def combine(self, out_MD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        """-> y_TD"""
        if self.ep_mesh is None:
            local: Tensor = LocalTokenDispatcher.combine(self, out_MD, metadata, x_TD)
            return local
        trip: Trip = metadata
        out_MD = out_MD.new_empty(out_MD.shape).index_copy(0, trip.place_M, out_MD)
        out_ND = exchange(out_MD, trip.recv_R, trip.send_R, trip.peers)
        out_ND = out_ND.new_empty(out_ND.shape).index_copy(0, trip.order_N, out_ND)
        out_TKD = out_ND.view(*trip.score_TK.shape, x_TD.shape[1]).to(at_least_fp32(out_ND.dtype))
        return (out_TKD * trip.score_TK[..., None]).sum(dim=1).to(x_TD.dtype)
