"""Peers: the ranks that share one set of experts, and the small collectives they run besides `exchange`."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe.comm.ballot import Ballot

T = TypeVar("T")
Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Peers | None"


class PeersLostError(RuntimeError):
    """A collective failed: another rank died, hangs or cannot be reached."""

    def forget(self) -> None:
        """Drop what the frames it came through hold: messages under way hold their group, and keep it open."""
        error: BaseException | None = self
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__


class Everyone(Enum):
    """All ranks of the default process group, or this process alone where there is none."""

    EVERYONE = "everyone"


EVERYONE = Everyone.EVERYONE


class Peers:
    """A process group and this process's place in it. No group means this process alone, and no collectives.

    Copying a module copies its weights; its peers stay the same, so copies share this object. ballot: where ranks come
    and go, what they tell each other in every step besides the counts.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int, ballot: Ballot | None = None) -> None:
        self.rank, self.size, self.ballot = rank, size, ballot
        self._group, self._given_up = group, False

    @property
    def group(self) -> dist.ProcessGroup | None:
        if self._given_up:
            raise PeersLostError(f"this group of {self.size} ranks was given up; its layers and their graphs are over")
        return self._group

    def give_up(self) -> None:
        """Let go of the group, whoever still holds this object (an old graph, say): a group that nobody refers to
        closes its connections, and ranks that wait for this one hear of it. Without a group there is nothing to do."""
        self._group, self._given_up = None, self._given_up or self._group is not None

    @classmethod
    def of(cls, group: Group | Everyone) -> Peers:
        """group: a process group, a one-dimensional DeviceMesh, EVERYONE, None for this process alone, or peers."""
        if isinstance(group, Peers):
            return group
        if isinstance(group, Everyone):
            group = dist.group.WORLD if dist.is_initialized() else None
        elif group is None and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            warnings.warn(
                f"group=None in one of {os.environ['WORLD_SIZE']} processes of a launcher: each keeps all experts and "
                f"works alone; call torch.distributed.init_process_group first, and pass a group",
                stacklevel=3,
            )
        if group is None:
            return cls(group=None, rank=0, size=1)
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"an expert-parallel mesh has one dimension; got {group}: slice it, as in mesh['ep']")
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"group={group!r}; use a process group, a one-dimensional DeviceMesh, or None for one process"
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group it was given; give each rank its own group")
        return cls(group=group, rank=rank, size=dist.get_world_size(group))

    def meet(self, group: dist.ProcessGroup) -> bool:
        """Are two or more of these ranks in that group?"""
        if self.group is None:
            return False
        return len(set(dist.get_process_group_ranks(self.group)) & set(dist.get_process_group_ranks(group))) > 1

    def __getstate__(self) -> dict[str, Any]:
        """For a file, in which a group means nothing."""
        if self._group is not None:
            raise ValueError(
                f"a layer on {self.size} ranks cannot be pickled whole, as by torch.save(model); save its "
                f"state_dict(), its expert_state(), or the model with moe.checkpoint.save"
            )
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self


@contextmanager
def reaching_peers() -> Iterator[None]:
    """What a backend raises, by one name."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise PeersLostError(str(error)) from error
    except ValueError as error:  # torch's log of the failure does not know groups that are registered nowhere
        if not isinstance(error.__context__, RuntimeError):
            raise
        raise PeersLostError(str(error.__context__)) from error


def gather_counts(count_E: Tensor, peers: Peers) -> NDArray[np.int64]:
    """Every rank's row of whole numbers, on every host: the one host synchronisation of a layer. -> [ranks, ...]"""
    if (ballot := peers.ballot) is not None:
        words = [count_E.new_full((1,), word) for word in (ballot.epoch, ballot.ready)]
        count_E = torch.cat([count_E, *words])
    if peers.group is None:
        count_RE = count_E[None]
    else:
        count_RE = count_E.new_empty(peers.size, len(count_E))
        with reaching_peers():
            dist.all_gather(list(count_RE.unbind(0)), count_E.contiguous(), group=peers.group)
    table: NDArray[np.int64] = count_RE.cpu().numpy()
    if ballot is not None:
        ballot.hear(table[:, -Ballot.WORDS :])
        table = table[:, : -Ballot.WORDS]
    return table


def gather_table(count_F: Tensor, peers: Peers) -> Tensor:
    """As gather_counts, but the table stays on its device and no host waits for it. -> [ranks, ...]"""
    if peers.group is None:
        return count_F[None]
    table_RF = count_F.new_empty(peers.size, len(count_F))
    with reaching_peers():
        dist.all_gather(list(table_RF.unbind(0)), count_F.contiguous(), group=peers.group)
    return table_RF


def sum_over(tensors: Sequence[Tensor], peers: Peers) -> None:
    """Add up each tensor over the ranks, in place, in one message for each type and device."""
    _reduce(tensors, peers, dist.ReduceOp.SUM)


def max_over(tensors: Sequence[Tensor], peers: Peers) -> None:
    """The largest of each number over the ranks, in place, in one message for each type and device."""
    _reduce(tensors, peers, dist.ReduceOp.MAX)


def _reduce(tensors: Sequence[Tensor], peers: Peers, operation: dist.ReduceOp.RedOpType) -> None:
    if peers.group is None:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for some in alike.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        with reaching_peers():
            dist.all_reduce(flat, op=operation, group=peers.group)
        for tensor, part in zip(some, torch.split(flat, [tensor.numel() for tensor in some])):
            tensor.copy_(part.view_as(tensor))


def nodes_of(group: Group) -> tuple[int, ...]:
    """The node of each rank, by host name, numbered as they appear: `LeastLoaded(node_R=nodes_of(group))`."""
    hosts = gather_objects(socket.gethostname(), Peers.of(group))
    number = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
    return tuple(number[host] for host in hosts)


def gather_objects(value: T, peers: Peers) -> list[T]:
    """Every rank's value, by rank. Pickled, so for set-up and tests, not for steps."""
    if peers.group is None:
        return [value]
    values: list[T | None] = [None] * peers.size
    dist.all_gather_object(values, value, group=peers.group)
    return cast(list[T], values)
