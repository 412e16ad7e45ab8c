"""Backup: experts of which the table has one copy, kept packed in the host memory of another member.

Made in the background after every change, for weights that do not change; only what the keeper lacks travels. Who keeps
whose is a policy: keepers(members, host of each) -> the keeper of each; all members need the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe.comm import Meeting, Pace, Peers, receive_parcel, send_parcel
from moe.epoch import Epoch
from moe.stock import Stock

Keepers = Callable[[Sequence[int], Mapping[int, str]], Mapping[int, int]]
Kept = dict[tuple[int, int], Tensor]
CPU = torch.device("cpu")


def nobody(members: Sequence[int], host_of: Mapping[int, str]) -> dict[int, int]:
    """No backups."""
    return {}


def other_host(members: Sequence[int], host_of: Mapping[int, str]) -> dict[int, int]:
    """The next member on another host; where all are on one, the next member."""
    keeper_of: dict[int, int] = {}
    for place, member in enumerate(members):
        others = [*members[place + 1 :], *members[:place]]
        away = [other for other in others if host_of.get(other) != host_of.get(member)]
        if others:
            keeper_of[member] = (away or others)[0]
    return keeper_of


def mirror(
    epoch: Epoch, member: int, keeper_of: Mapping[int, int], stock: Stock, kept: Kept, meeting: Meeting, pace: Pace
) -> set[tuple[int, int]]:
    """All members call. kept: what this one keeps of others, by layer and expert; what it lacks is added.
    -> what it is to keep

    The rest is not dropped here: this is a thread, perhaps of an epoch that has broken by now, and what it would drop
    may be what the survivors have just been told to restore.
    """
    peers = meeting.meet(f"backup-{epoch.number}", epoch.rank_of(member), len(epoch.members))
    mine: set[tuple[int, int]] = set()
    for ward in epoch.members:  # one after the other, so that nobody waits in a circle
        keeper = keeper_of[ward]
        alone = only_copies(epoch, ward)
        if not alone:
            continue
        if member == ward:
            lacks = receive_parcel(8 * len(alone), epoch.rank_of(keeper), peers, pace, stock.device)
            for (layer, expert), lacking in zip(alone, lacks.view(torch.int64).tolist(), strict=True):
                if lacking:
                    send_parcel(stock.pack(layer, expert), epoch.rank_of(keeper), peers, pace)
        elif member == keeper:
            mine |= set(alone)
            _fetch(alone, epoch.rank_of(ward), stock, kept, peers, pace)
    return mine


def _fetch(alone: Sequence[tuple[int, int]], rank: int, stock: Stock, kept: Kept, peers: Peers, pace: Pace) -> None:
    lacks = torch.tensor([cell not in kept for cell in alone], dtype=torch.int64, device=stock.device)
    send_parcel(lacks.view(torch.uint8), rank, peers, pace)
    for layer, expert in alone:
        if (layer, expert) not in kept:
            size = stock.parcel_bytes(layer)
            kept[layer, expert] = receive_parcel(size, rank, peers, pace, stock.device).to(CPU)


def only_copies(epoch: Epoch, member: int) -> list[tuple[int, int]]:
    """The experts of which this member has the only copy."""
    assert epoch.plan is not None
    return [
        (layer, expert)
        for layer, placement in enumerate(epoch.plan.placement_L)
        for expert in sorted(epoch.experts_of(member, layer))
        if placement.copies_E[expert] == 1
    ]
