"""CoreMoE: evenmoe's layer in the place of the experts of a Megatron layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from moe.batch import Batch
from moe.census import Pool
from moe.config import MoEConfig
from moe.integrations.megatron.experts import CoreExperts, HostActivation
from moe.integrations.megatron.router import Prices
from moe.layer import MoE
from placement import Placement
from routing import Assigner, Balancer, Choice, Rows, Unpriced

EMPTY = -1


class CoreMoE(MoE):
    """(tokens [T, dim], probs [T, E], routing map [T, E]) -> [T, dim], as Megatron's router gives them.

    An evenmoe layer in every other respect: observers, Recorder, Meters, settle_prices and move_experts know it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        assigner: Assigner,
        balancer: Balancer,
        placement: Placement | None,
    ) -> None:
        with torch.random.fork_rng(devices=[]):  # what is made on the meta device would draw numbers too
            super().__init__(
                _config(config, assigner, balancer),
                groups.ep,
                in_order(config.num_moe_experts, groups.ep.size()) if placement is None else placement,
                device="meta",
            )
        self.groups = groups
        self.experts = CoreExperts(config, self.placement.experts_of(self.peers.rank).tolist())
        device = self.experts.stack().up.device
        self.router = Prices(config, balancer, device)
        self.pool = Pool(config.num_moe_experts, device)
        self._told: tuple[Tensor, Tensor] | None = None

    def forward(self, x_TD: Tensor, probs_TE: Tensor, map_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        self._told = probs_TE, map_TE
        try:
            y_TD: Tensor = super().forward(x_TD, valid_T)
            return y_TD.to(x_TD.dtype)
        finally:
            self._told = None

    def _route(self, batch: Batch, rows: Rows | None = None) -> Choice:
        assert self._told is not None
        assert isinstance(self.router, Prices)
        return self.router.told_by_map(*self._told, rows)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Experts, by expert, under Megatron's own keys; and prices, if there is a balancer. The statistics of a step
        that is not settled are not saved: checkpoints are made between steps."""
        assert isinstance(self.experts, CoreExperts)
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        shards = self.experts.shards(
            self.placement, self.peers.rank, self.groups.expt_dp.rank(), f"{prefix}experts.", sharded_offsets, metadata
        )
        if isinstance(self.router.balancer, Unpriced):
            return shards
        prices = {"price_E": self.router.price_E, "settled": self.router.settled}
        shards |= make_sharded_tensors_for_checkpoint(
            prices,
            f"{prefix}router.",
            sharded_offsets=sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return shards

    def backward_dw(self) -> None:
        """Megatron calls it where weight gradients are delayed; ours never are."""


def _config(config: TransformerConfig, assigner: Assigner, balancer: Balancer) -> MoEConfig:
    return MoEConfig(
        dim=config.hidden_size,
        hidden=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        balancer=balancer,
        assigner=assigner,
        activation=HostActivation.of(config),
        bias=config.add_bias_linear,
    )


def in_order(num_experts: int, ranks: int) -> Placement:
    """Where Megatron has them: neighbours together; the first ranks hold one more where they do not divide evenly."""
    slots = -(-num_experts // ranks)
    expert_RS = np.full((ranks, slots), EMPTY)
    for rank, own in enumerate(np.array_split(np.arange(num_experts), ranks)):
        expert_RS[rank, : len(own)] = own
    return Placement(expert_RS=expert_RS)
