"""Apart: copies of an expert on as many nodes as can be, so that tokens find one on their own. Balance stays as it is.

Ranks of the same speed and slots can take each other's experts without any rank's load changing. So a plan is made
first, and then its ranks are dealt to nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from placement.packing import held_LRE
from placement.topology import Topology

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
HARDLY = 1e-9


def apart(expert_LRS: IntArray, load_LE: FloatArray, topology: Topology) -> IntArray:
    """The same ranks in another order: swaps of two, the best first, while load comes to more nodes by it."""
    node_R = np.array(topology.node_R)
    if node_R.max() == 0 or expert_LRS.shape[2] == 0:
        return expert_LRS
    kind_R = list(zip(topology.slots_R, topology.speed_R))
    alike_RR = np.array([[one == other for other in kind_R] for one in kind_R])
    swaps_RR = alike_RR & (node_R[:, None] != node_R)
    dealt_LRS = expert_LRS.copy()
    for layer, held_RE in enumerate(held_LRE(expert_LRS, load_LE.shape[1])[:, :, :-1]):
        if (held_RE.sum(axis=0) > 1).any() and swaps_RR.any():
            dealt_LRS[layer] = expert_LRS[layer][_order(held_RE.astype(np.float64), load_LE[layer], node_R, swaps_RR)]
    return dealt_LRS


def _order(held_RE: FloatArray, load_E: FloatArray, node_R: IntArray, swaps_RR: NDArray[np.bool_]) -> IntArray:
    """Which rank's experts go to each rank."""
    order_R = np.arange(len(held_RE))
    on_VR = (np.arange(node_R.max() + 1)[:, None] == node_R).astype(np.float64)
    least = HARDLY * load_E.sum()
    for _ in range(len(held_RE)):
        here_RE = held_RE[order_R]
        copies_RE = (on_VR @ here_RE)[node_R]  # of each expert on the rank's node
        alone_RE, weighed_ER = here_RE * (copies_RE == 1), (here_RE * load_E).T
        # What a rank's node gains if the other rank's experts come and the rank's own leave.
        gain_RR = (copies_RE == 0) @ weighed_ER + alone_RE @ weighed_ER - (alone_RE @ load_E)[:, None]
        both_RR = np.where(swaps_RR, gain_RR + gain_RR.T, -np.inf)
        one, other = divmod(int(both_RR.argmax()), len(order_R))
        if both_RR[one, other] <= least:
            break
        order_R[[one, other]] = order_R[[other, one]]
    return order_R
