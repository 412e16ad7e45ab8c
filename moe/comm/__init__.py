"""The only place that talks to torch.distributed. Every rank runs every collective, with rows or without."""

from moe.comm.exchange import exchange
from moe.comm.group import EVERYONE, Everyone, Group, Peers, gather_counts, gather_objects, max_over, nodes_of, sum_over
from moe.comm.lend import Coming, Lending, tie, visitors
from moe.comm.move import WORD, checksums, ship
from moe.comm.store import Folder, Shelf, Stored, read_tensors, stored_tensors, write_tensors
from moe.comm.world import World, WorldError, world_group

__all__ = [
    "EVERYONE",
    "WORD",
    "Coming",
    "Everyone",
    "Folder",
    "Group",
    "Lending",
    "Peers",
    "Shelf",
    "Stored",
    "World",
    "WorldError",
    "checksums",
    "exchange",
    "gather_counts",
    "gather_objects",
    "max_over",
    "nodes_of",
    "read_tensors",
    "ship",
    "stored_tensors",
    "sum_over",
    "tie",
    "visitors",
    "world_group",
    "write_tensors",
]  # fmt: skip
