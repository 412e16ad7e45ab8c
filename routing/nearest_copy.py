"""NearestCopy: rows go where a copy of their expert is closest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement import Placement
from routing.assigner import at_home
from routing.assignment import Assignment
from routing.copies import copies_of, require_nodes


@dataclass(frozen=True, kw_only=True)
class NearestCopy:
    """A row is computed by the copy on its own rank, else by those on its node, evenly, else by all copies, evenly.

    An expert without another copy is computed at home; none visits. It looks at no rank's load: near links first,
    whatever the balance, so its peak can be above AtHome's. node_R: the node of each rank; empty means one node.

    It decides how many rows each copy computes. Which rows those are is the Assignment's law: own rows stay; the rest
    of an expert's stay on their node if nodes are blocks of ranks and each that has rows has a copy.
    """

    node_R: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_R", tuple(int(node) for node in self.node_R))

    def __call__(self, count_RE: NDArray[np.int64], placement: Placement) -> Assignment:
        require_nodes(self.node_R, len(count_RE))
        load_E = count_RE.sum(axis=0)
        if count_RE.shape != placement.held_RE.shape or placement.slots == placement.num_experts:
            return at_home(count_RE, load_E, placement)
        copies = copies_of(placement, self.node_R)
        return copies.assigned(count_RE, load_E, placement, copies.nearest(count_RE, load_E))
