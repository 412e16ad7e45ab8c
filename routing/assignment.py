"""Assignment: who computes what, for one step. Two integer tables; everything else follows from them. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement import Placement
from routing.native import DECIDERS, address, takes

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Loan:
    """An expert visits a rank for one step: its weights go to the borrower, their gradient comes home to the lender."""

    expert: int
    lender: int
    borrower: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Which rank computes how many rows of which expert.

    count_RE: rows that rank r routed to expert e. quota_RE: rows of expert e that rank r computes. The law: what was
    routed is computed, expert by expert.
    """

    count_RE: IntArray
    quota_RE: IntArray

    def __post_init__(self) -> None:
        if self.count_RE.shape != self.quota_RE.shape or self.count_RE.ndim != 2:
            raise ValueError(
                f"count_RE and quota_RE must be tables [ranks, experts] of one shape; got {self.count_RE.shape} "
                f"and {self.quota_RE.shape}"
            )
        if self.count_RE.dtype.kind not in "iu" or self.quota_RE.dtype.kind not in "iu":
            raise ValueError(f"rows are whole; got tables of {self.count_RE.dtype} and {self.quota_RE.dtype}")
        if self._lawful():
            return
        if self.count_RE.size and min(self.count_RE.min(), self.quota_RE.min()) < 0:
            raise ValueError("count_RE and quota_RE count rows; they cannot be negative")
        routed_E, computed_E = self.count_RE.sum(axis=0), self.quota_RE.sum(axis=0)
        if (lost := np.flatnonzero(routed_E != computed_E)).size:
            expert = int(lost[0])
            raise ValueError(
                f"expert {expert} was routed {routed_E[expert]} rows but assigned {computed_E[expert]}; "
                f"an assigner must keep quota_RE.sum(0) == count_RE.sum(0)"
            )

    def _lawful(self) -> bool:
        """Whether the compiled check finds nothing wrong. It says no where it cannot tell."""
        library = DECIDERS.load()
        if library is None or not (takes(self.count_RE) and takes(self.quota_RE)):
            return False
        tables = address(self.count_RE), address(self.quota_RE)
        return not library.evenmoe_unlawful(*tables, *self.count_RE.shape)

    @property
    def load_R(self) -> IntArray:
        """Rows that each rank computes."""
        load_R: IntArray = self.quota_RE.sum(axis=1)
        return load_R

    def loans(self, placement: Placement) -> tuple[Loan, ...]:
        """The experts that must visit a rank which holds no copy of them, by borrower, then expert. Home lends."""
        visit = np.argwhere((self.quota_RE > 0) & ~placement.held_RE)
        home_E = placement.home_E.tolist()
        return tuple(Loan(expert=e, lender=home_E[e], borrower=r) for r, e in visit.tolist())

    def flow_RRE(self) -> IntArray:
        """Rows going [source, destination, expert]: the whole table. A rank needs only the two slices below."""
        ranks = len(self.count_RE)
        return np.stack([self.sent_by(rank) for rank in range(ranks)])

    def sent_by(self, rank: int) -> IntArray:
        """flow[rank, :, :]: rows of this rank going to each destination. -> [destination, expert]"""
        return self._overlap(self.count_RE, self.quota_RE, rank)

    def received_by(self, rank: int) -> IntArray:
        """flow[:, rank, :]: rows computed on this rank, by the source they come from. -> [source, expert]"""
        return self._overlap(self.quota_RE, self.count_RE, rank)

    def _overlap(self, mine_RE: IntArray, theirs_RE: IntArray, rank: int) -> IntArray:
        """A rank computes its own rows first. The rest of an expert's rows lie in a line, in source order; the rest of
        its quotas lie along the same line, in destination order; where two intervals overlap, rows flow."""
        kept_RE = np.minimum(mine_RE, theirs_RE)
        end_RE = (theirs_RE - kept_RE).cumsum(axis=0)
        start_RE = end_RE - (theirs_RE - kept_RE)
        rest_RE = mine_RE - kept_RE
        start_E = rest_RE[:rank].sum(axis=0)
        flow_RE: IntArray = np.minimum(end_RE, start_E + rest_RE[rank]) - np.maximum(start_RE, start_E)
        np.maximum(flow_RE, 0, out=flow_RE)
        flow_RE[rank] += kept_RE[rank]
        return flow_RE
