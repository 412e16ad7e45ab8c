"""DeepSpeed's process groups: it keeps its own, by size, and reduces the gradients of experts over them."""

from __future__ import annotations

import deepspeed
from deepspeed import comm
from deepspeed.utils import groups

from moe.comm import Group, Peers

SHARED_MEMORY = "deepspeed_shm_comm"


def expert_group(ep_size: int) -> Group:
    """The ranks that share one set of experts: this rank's among those of ep_size consecutive ranks. Every rank calls.

    Starts DeepSpeed's communication as `deepspeed.init_distributed()` does, if nobody has. On a CPU that would compile
    an extension with g++ first, which training never uses (it serves `inference_all_reduce`); here it is left out.
    """
    _join()
    ranks = comm.get_world_size()
    if ep_size < 1 or ranks % ep_size:
        raise ValueError(f"ep_size={ep_size} on {ranks} ranks; use a number that divides them")
    name = group_name(ep_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    group: Group = groups._get_expert_parallel_group(name)
    return group


def group_name(ep_size: int) -> str:
    """What DeepSpeed calls both: the ranks that share a set of experts, and those that have the same of it."""
    return f"ep_size_{ep_size}"


def is_deepspeeds(peers: Peers) -> bool:
    """Are these ranks the ones that DeepSpeed would put together? Makes its group of that size, if it has none."""
    own = (
        [comm.get_rank()] if peers.group is None else [comm.get_global_rank(peers.group, r) for r in range(peers.size)]
    )
    if comm.get_world_size() % peers.size:
        return False
    expert_group(peers.size)
    return own == list(groups._get_expert_parallel_group_ranks(group_name(peers.size)))


def _join() -> None:
    if not comm.is_initialized():
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
        try:
            deepspeed.init_distributed()
        except ModuleNotFoundError as error:  # without RANK it looks for MPI
            raise RuntimeError(f"RANK is not set ({error}): start this with torchrun, or with deepspeed") from error
