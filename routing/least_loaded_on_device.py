"""LeastLoadedOnDevice: the least-loaded decision on the device of the counts, with nothing that the host must wait for.

Rows that leave overloaded ranks lie on one line, the room of the others on another, and where the two overlap rows
move. That takes sorts, cumulative sums and clamps of fixed shapes: no number is read back, no shape depends on one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from routing.least_loaded import MOST_HEADROOM, BreakEven


@dataclass(frozen=True, kw_only=True)
class LeastLoadedOnDevice:
    """No rank computes ceil(headroom * rows / ranks) + min_chunk rows or more, unless the plan is not worth it.

    count_RE, home_E -> quota_RE, int64, on their device: the table that LeastLoaded's Assignment holds, by another
    rule. Only overloaded ranks lend, of their biggest experts, as few as will do; the ranks with most room borrow, as
    few as will do. Two lines of n experts and k ranks overlap in fewer than n + k places, so with chunks of one row
    visits are fewer than twice the fewest possible. LeastLoaded, which searches for the best fit, makes fewer.

    headroom, worth: as in LeastLoaded. min_chunk: a visit brings at least half of it, or a whole expert; an excess
    below it stays at home. Nodes, and copies other than home, are not considered; use LeastLoaded for these.

    `moe.Planned` is the layer that acts on it. It cannot check what it does not read: a home that is no rank loses its
    expert's rows. Not run on a GPU yet.
    """

    headroom: float = 1.05
    min_chunk: int = 1
    worth: BreakEven = BreakEven()

    def __post_init__(self) -> None:
        if not 1.0 <= self.headroom <= MOST_HEADROOM:
            raise ValueError(
                f"headroom={self.headroom}; a multiple of the mean load: use 1 <= headroom <= {MOST_HEADROOM:g}"
            )
        if self.min_chunk < 1:
            raise ValueError(f"min_chunk={self.min_chunk}; a visit brings at least 1 row")

    def __call__(self, count_RE: Tensor, home_E: Tensor) -> Tensor:
        """count_RE: rows that each rank routed to each expert. home_E: each expert's home. -> quota_RE"""
        if count_RE.ndim != 2 or home_E.shape != count_RE.shape[1:]:
            raise ValueError(
                f"count_RE must be [ranks, experts] and home_E [experts]; got {tuple(count_RE.shape)} and "
                f"{tuple(home_E.shape)}"
            )
        ranks, load_E = len(count_RE), count_RE.sum(dim=0)
        lives_RE = home_E == torch.arange(ranks, device=home_E.device)[:, None]
        home_RE = torch.where(lives_RE, load_E, 0)
        home_R = home_RE.sum(dim=1)
        capacity = (self.headroom * home_R.sum().double() / ranks).ceil().long()
        leaving_E, start_E = self._leaving(load_E, home_R, home_E, home_R - capacity)
        room_R = (capacity - home_R).clamp(min=0)
        order_R = room_R.argsort(descending=True, stable=True)
        end_R = torch.empty_like(room_R).scatter(0, order_R, room_R.gather(0, order_R).cumsum(dim=0))
        came_RE = self._cut(end_R, leaving_E, start_E) - self._cut(end_R - room_R, leaving_E, start_E)
        quota_RE = torch.where(lives_RE, load_E - leaving_E, came_RE)
        return torch.where(self._pays(home_R, quota_RE, lives_RE), quota_RE, home_RE)

    def _leaving(self, load_E: Tensor, home_R: Tensor, home_E: Tensor, excess_R: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of each expert that leave home, its rank's biggest experts first, and where they begin on the line."""
        excess_R = torch.where(excess_R >= self.min_chunk, excess_R, 0)
        by_load = load_E.argsort(descending=True, stable=True)
        order_E = by_load.gather(0, home_E.gather(0, by_load).argsort(stable=True))
        load_S, home_S = load_E.gather(0, order_E), home_E.gather(0, order_E)
        bigger_S = load_S.cumsum(dim=0) - load_S - (home_R.cumsum(dim=0) - home_R).gather(0, home_S)
        leaving_S = (excess_R.gather(0, home_S) - bigger_S).clamp(min=0).minimum(load_S)
        # What the last expert of a rank would give may be less than a chunk.
        leaving_S = torch.where((leaving_S < self.min_chunk) & (leaving_S < load_S), 0, leaving_S)
        leaving_E = torch.empty_like(load_E).scatter(0, order_E, leaving_S)
        return leaving_E, torch.empty_like(load_E).scatter(0, order_E, leaving_S.cumsum(dim=0) - leaving_S)

    def _cut(self, edge_R: Tensor, leaving_E: Tensor, start_E: Tensor) -> Tensor:
        """Rows of each expert before an edge on the line of room, in whole chunks. -> [R, E]

        An expert's rows leave in ceil(rows / min_chunk) chunks as even as can be. The chunk under an edge goes to the
        rank beyond it, which so takes less than a chunk too many.
        """
        before_RE = (edge_R[:, None] - start_E).clamp(min=0).minimum(leaving_E)
        chunks_E = (leaving_E + (self.min_chunk - 1)) // self.min_chunk
        whole_RE = ((before_RE + 1) * chunks_E - 1) // leaving_E.clamp(min=1)
        return whole_RE * leaving_E // chunks_E.clamp(min=1)

    def _pays(self, home_R: Tensor, quota_RE: Tensor, lives_RE: Tensor) -> Tensor:
        """Does what the busiest rank is spared exceed the price of the visits at the rank that has most of them?"""
        visit_RE = (quota_RE > 0) & ~lives_RE
        lent_R = torch.where(lives_RE, visit_RE.sum(dim=0), 0).sum(dim=1)
        most = (lent_R + visit_RE.sum(dim=1)).max()
        return home_R.max() - quota_RE.sum(dim=1).max() > self.worth.rows * most.double()
