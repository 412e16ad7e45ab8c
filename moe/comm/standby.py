"""Groups that are made while others work: of any members, in any thread, at any time, and nowhere registered.

The default group of torch.distributed cannot grow. These groups stand by themselves: a store tells their ranks of each
other, a name that is never used again keeps them apart. To give one up, drop the last reference: that closes its
connections, and whoever waits on them hears of it; abort() of gloo frees nobody.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from moe.comm.ballot import Ballot
from moe.comm.group import Peers, reaching_peers


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where members meet. store: host and port of the coordinator's store. here: this machine's address, as others see
    it. device: of the tensors that will travel. timeout: seconds after which a silent peer counts as lost."""

    store: tuple[str, int]
    here: str
    device: torch.device
    timeout: float

    def meet(self, name: str, rank: int, size: int, ballot: Ballot | None = None) -> Peers:
        """All ranks of the new group must call; it returns when they are connected. Raises PeersLostError if one does
        not come in time."""
        limit = timedelta(seconds=self.timeout)
        with reaching_peers():
            # A client of its own: one that waits would keep others waiting.
            store = PrefixStore(name, TCPStore(*self.store, is_master=False, timeout=limit, wait_for_workers=False))
            group = ProcessGroup(store, rank, size)
            if self.device.type == "cuda":
                self._over_nccl(group, store, rank, size, limit)
            else:
                self._over_gloo(group, store, rank, size, limit)
        return Peers(group=group, rank=rank, size=size, ballot=ballot)

    def _over_gloo(self, group: ProcessGroup, store: PrefixStore, rank: int, size: int, limit: timedelta) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout, options._threads = limit, 2
        options._devices = [ProcessGroupGloo.create_device(hostname=self.here)]
        kind = ProcessGroup.BackendType.GLOO
        group._set_default_backend(kind)
        group._register_backend(torch.device("cpu"), kind, ProcessGroupGloo(store, rank, size, options))

    def _over_nccl(self, group: ProcessGroup, store: PrefixStore, rank: int, size: int, limit: timedelta) -> None:
        """Not tested: no machine with several GPUs was at hand."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        backend = dist.ProcessGroupNCCL(store, rank, size, options)
        kind = ProcessGroup.BackendType.NCCL
        group._set_default_backend(kind)
        group._register_backend(self.device, kind, backend)
        backend.eager_connect_single_device(self.device)  # here, in the background, and not in the first step


def store_server(host: str) -> TCPStore:
    """A store that outlives any worker, on that address alone; its port is any free one."""
    # Left to itself the store listens on every address of this machine, whatever its host is.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
