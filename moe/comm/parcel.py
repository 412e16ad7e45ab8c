"""Bytes from one rank to another beside the traffic of the steps: in small portions with pauses, and checked."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.comm.group import Peers, reaching_peers
from moe.comm.move import WORD, checksums

TAG = 0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """chunk: bytes of a message. bytes_per_second: what a sender allows itself, so that steps keep their network."""

    chunk: int = 2**20
    bytes_per_second: float = 1e9

    def __post_init__(self) -> None:
        if self.chunk < WORD or self.bytes_per_second <= 0:
            raise ValueError(f"a Pace needs a chunk of at least {WORD} bytes and a speed > 0; got {self}")

    def pause(self, num_bytes: int, since: float) -> None:
        time.sleep(max(num_bytes / self.bytes_per_second - (time.monotonic() - since), 0.0))


def send_parcel(row_B: Tensor, rank: int, peers: Peers, pace: Pace) -> None:
    """row_B: uint8, whole words. The other rank must call receive_parcel, and all parcels in one order."""
    assert peers.group is not None
    with reaching_peers():
        for part_B in torch.split(row_B, pace.chunk):
            since = time.monotonic()
            peers.group.send([part_B], rank, TAG).wait()
            pace.pause(len(part_B), since)
        peers.group.send([checksums(row_B[None])[0]], rank, TAG).wait()


def receive_parcel(num_bytes: int, rank: int, peers: Peers, pace: Pace, device: torch.device) -> Tensor:
    """-> row_B, as it was sent; raises where it was damaged."""
    assert peers.group is not None
    row_B = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    seal = torch.empty(1, dtype=torch.int64, device=device)
    with reaching_peers():
        for part_B in torch.split(row_B, pace.chunk):
            peers.group.recv([part_B], rank, TAG).wait()
        peers.group.recv([seal], rank, TAG).wait()
    if not torch.equal(checksums(row_B[None])[0], seal):
        raise RuntimeError(f"{num_bytes} bytes from rank {rank} were damaged on the way")
    return row_B
