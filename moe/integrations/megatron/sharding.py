"""A stack of experts for megatron.core.dist_checkpointing: by expert, not by rank, in the keys of Megatron's own layer.

So a checkpoint of Megatron's SequentialMLP or TEGroupedMLP loads here and the other way round, on any number of ranks.
Megatron has two layouts, and the metadata of a checkpoint says which: one tensor for all experts of a layer, expert by
expert along its first axis, or (`singleton_local_shards`) one key an expert, ....experts.<expert>.linear_fc1.weight_w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from placement import Placement


@dataclass(frozen=True, kw_only=True)
class Where:
    """The experts in this rank's slots. copy: 0 for the home of an expert, which is saved. singleton: a key each."""

    expert_S: tuple[int, ...]
    copy_S: tuple[int, ...]
    num_experts: int
    singleton: bool

    @classmethod
    def of(cls, placement: Placement, rank: int, *, singleton: bool) -> Self:
        expert_S = tuple(int(expert) for expert in placement.experts_of(rank))
        home_E = placement.home_E
        copy_S = tuple(0 if home_E[expert] == rank else 1 + rank for expert in expert_S)
        return cls(expert_S=expert_S, copy_S=copy_S, num_experts=placement.num_experts, singleton=singleton)

    def replica(self, slot: int, given: tuple[int, int, int]) -> tuple[int, int, int]:
        """Megatron writes what is (0, 0, 0)."""
        return given[0], given[1] + self.copy_S[slot], given[2]


def shard_by_expert(
    key: str, stack: Tensor, where: Where, offsets: tuple[Any, ...], *, halves: int, replica: int
) -> ShardedTensorFactory:
    """stack: [S, ...], a parameter; what an optimiser keeps for it goes the same way. offsets: of the layers around.
    halves: 2 where Megatron saves the gate and the rest apart. replica: this rank among those with the same experts."""

    def build_shards(
        key: str, stack: Tensor, replica: tuple[int, int, int], flattened_range: slice | None = None
    ) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise ValueError("an optimiser that flattens experts cannot tell them apart; save it fully reshardable")
        return [
            _shard(key, part, where, slot, (half, halves), offsets, replica)
            for slot, whole in enumerate(stack.unbind(0))
            for half, part in enumerate(whole.chunk(halves))
        ]

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        if not where.expert_S:
            return torch.empty_like(stack)
        whole = [torch.cat(parts[slot * halves : (slot + 1) * halves]) for slot in range(len(where.expert_S))]
        return torch.stack(whole)

    return ShardedTensorFactory(key, stack, build_shards, merge, (0, 0, replica))


def nothing_more(
    key: str, expert: int, where: Where, offsets: tuple[Any, ...], replica: tuple[int, int, int]
) -> ShardedObject:
    """What Megatron's own linear layers save besides their weights, which is nothing, and look for when they load.

    key: of a weight of the stack.
    """
    key, depth = f"{key.rpartition('.')[0]}._extra_state", len(offsets)
    if where.singleton:
        return make_sharded_object_for_checkpoint(None, _singled(key, expert), offsets, replica_id=replica)
    along = (*offsets, (depth, expert, where.num_experts))
    return make_sharded_object_for_checkpoint(None, key, along, replica_id=replica)


def _singled(key: str, expert: int) -> str:
    """....experts.linear_fc1.weight -> ....experts.7.linear_fc1.weight"""
    block, _, leaf = key.rpartition(".linear_")
    return f"{block}.{expert}.linear_{leaf}"


def _shard(
    key: str,
    part: Tensor,
    where: Where,
    slot: int,
    of_halves: tuple[int, int],
    offsets: tuple[Any, ...],
    given: tuple[int, int, int],
) -> ShardedTensor:
    expert, (half, halves), depth = where.expert_S[slot], of_halves, len(offsets)
    replica = where.replica(slot, given)
    if where.singleton:
        key = _singled(key, expert) + (("_w", "_v")[half] if halves == 2 else "")
        return ShardedTensor.from_rank_offsets(key, part, *offsets, replica_id=replica, prepend_axis_num=depth)
    along = [(depth, expert, where.num_experts)]
    if halves == 2:
        along.append((depth + 1, half, halves))
    return ShardedTensor.from_rank_offsets(key, part, *offsets, *along, replica_id=replica, prepend_axis_num=depth + 1)
