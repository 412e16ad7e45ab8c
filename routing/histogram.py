"""Histogram: how values lie about a centre, in counts that add up over ranks and micro-batches to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.dual import Ends

FINEST = 2.0**-20  # the scale at which the bins stop to narrow, as a share of the reach
SPAN = math.asinh(1 / FINEST)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Bins fine about a centre and ever wider away from it, each side as far as `reach`.

    Bins as wide as each other are either too few or too narrow a range: a price must be met to a millionth and may have
    far to go. Here a bin's width is a share of its distance from the centre, and the centre is the standing price: with
    every settling the price gets nearer its mark, and so the bins there finer. What lies farther out counts in the
    outermost bins.
    """

    bins: int
    reach: float

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"bins={self.bins} cannot tell high from low; use at least 2")
        if not 0 < self.reach < float("inf"):
            raise ValueError(f"reach={self.reach}: use how far a price may be from its mark, in units of the scores")

    @property
    def _unit(self) -> float:
        return self.reach * FINEST

    def count(self, value_TE: Tensor, centre_E: Tensor, valid_T: Tensor | None) -> Tensor:
        """Values in each bin, in float64. -> count_EB"""
        num_experts = value_TE.shape[1]
        place_TE = ((value_TE - centre_E.to(value_TE.dtype)) / self._unit).asinh_().div_(SPAN)
        bin_TE = ((place_TE + 1) * (self.bins / 2)).clamp_(0, self.bins - 1).long()
        bin_TE += torch.arange(num_experts, device=bin_TE.device) * self.bins
        one_TE = torch.ones_like(bin_TE, dtype=torch.float64)
        if valid_T is not None:  # padding may hold NaN, which has no bin
            bin_TE, one_TE = bin_TE.where(valid_T[:, None], 0), one_TE.where(valid_T[:, None], 0.0)
        count_EB = one_TE.new_zeros(num_experts * self.bins)
        count_EB.scatter_add_(0, bin_TE.flatten(), one_TE.flatten())
        return count_EB.view(num_experts, self.bins)

    def edges(self, device: torch.device) -> Tensor:
        """From where to where each bin goes, less the centre. -> edge_B, one more than bins, float64"""
        edge_B = torch.linspace(-1, 1, self.bins + 1, dtype=torch.float64, device=device)
        return (edge_B * SPAN).sinh() * self._unit

    def ends(self, count_EB: Tensor, rank: Tensor) -> Ends:
        """From where to where `rank` values of each expert lie above, less its centre, as if a bin's lay even in it.

        0 < rank < the values of each, or the ends are no numbers. Empty bins make the two ends differ, as between two
        neighbouring values.
        """
        edge_B = self.edges(count_EB.device)
        above_EB = count_EB.long().flip(1).cumsum(1).flip(1)  # of floats, a GPU's is not deterministic
        above_EB = torch.cat([above_EB, torch.zeros_like(above_EB[:, :1])], dim=1)
        first_E = (above_EB > rank).sum(dim=1, keepdim=True).clamp(1, self.bins)
        last_E = (above_EB >= rank).sum(dim=1, keepdim=True).clamp(1, self.bins)
        lower_E = _within(above_EB, edge_B, first_E, rank)
        upper_E = _within(above_EB, edge_B, last_E, rank)
        return Ends(lower_E, upper_E)


def _within(above_EB: Tensor, edge_B: Tensor, right_E: Tensor, rank: Tensor) -> Tensor:
    """Where `rank` values lie above, in the bin that ends at edge right_E."""
    below_E, above_E = above_EB.gather(1, right_E - 1), above_EB.gather(1, right_E)
    share_E = (below_E - rank) / (below_E - above_E)
    left_E, width_E = edge_B[right_E - 1], edge_B[right_E] - edge_B[right_E - 1]
    return (left_E + share_E * width_E).squeeze(1)
