"""The only place that talks to torch.distributed. Every rank runs every collective, with rows or without."""

from moe.comm.ballot import Ballot
from moe.comm.exchange import exchange, exchange_into, gather_rows
from moe.comm.group import (
    EVERYONE,
    Everyone,
    Group,
    Peers,
    PeersLostError,
    gather_counts,
    gather_objects,
    gather_table,
    max_over,
    nodes_of,
    sum_over,
)
from moe.comm.lend import Coming, Lending, tie, visitors
from moe.comm.membership import CoordinatorLostError, Membership, View, ask, located
from moe.comm.mesh import as_shard, here, is_shard, join, mesh_of, put, shard_powers
from moe.comm.move import WORD, checksums, ship
from moe.comm.parcel import Pace, receive_parcel, send_parcel
from moe.comm.process import kill, spare
from moe.comm.serve import Server
from moe.comm.standby import Meeting
from moe.comm.store import Folder, Shelf, Stored, read_tensors, stored_tensors, write_tensors
from moe.comm.unseen import unseen
from moe.comm.world import World, WorldError, world_group

__all__ = [
    "EVERYONE",
    "WORD",
    "Ballot",
    "Coming",
    "CoordinatorLostError",
    "Everyone",
    "Folder",
    "Group",
    "Lending",
    "Meeting",
    "Membership",
    "Pace",
    "Peers",
    "PeersLostError",
    "Server",
    "Shelf",
    "Stored",
    "View",
    "World",
    "WorldError",
    "as_shard",
    "ask",
    "checksums",
    "exchange",
    "exchange_into",
    "gather_counts",
    "gather_objects",
    "gather_rows",
    "gather_table",
    "here",
    "is_shard",
    "join",
    "kill",
    "located",
    "max_over",
    "mesh_of",
    "nodes_of",
    "put",
    "read_tensors",
    "receive_parcel",
    "send_parcel",
    "shard_powers",
    "ship",
    "spare",
    "stored_tensors",
    "sum_over",
    "tie",
    "unseen",
    "visitors",
    "world_group",
    "write_tensors",
]  # fmt: skip
