"""The only place that talks to torch.distributed. Every rank runs every collective, with rows or without."""

from moe.comm.exchange import exchange
from moe.comm.group import EVERYONE, Everyone, Group, Peers, gather_counts, gather_objects, max_over, nodes_of, sum_over
from moe.comm.lend import lend, tie, visitors
from moe.comm.world import World, WorldError, world_group

__all__ = [
    "EVERYONE", "Everyone", "Group", "Peers", "World", "WorldError", "exchange", "gather_counts", "gather_objects",
    "lend", "max_over", "nodes_of", "sum_over", "tie", "visitors", "world_group",
]  # fmt: skip
