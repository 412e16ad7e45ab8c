"""MoE layers that Megatron takes for its own: instances of its MoELayer, built and called as it is.

CoreMoELayer        Megatron's router, evenmoe's everything else: any placement, copies, any assigner
DispatchedMoELayer  Megatron's own layer and experts, evenmoe's dispatcher
"""

from __future__ import annotations

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoECudaGraphTensorStore
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe.integrations.megatron.core import CoreMoE
from moe.integrations.megatron.dispatcher import EvenDispatcher, VisitedExperts
from moe.integrations.megatron.router import PricedRouter, Prices, check_balancer, price
from moe.integrations.megatron.versions import build, groups_of, taken_by
from placement import Placement
from routing import Assigner, AtHome, Balancer, Unpriced


class CoreMoELayer(MoELayer):  # type: ignore[misc]
    """In the place of Megatron's MoELayer: same constructor, same call, same keys in distributed checkpoints.

    [s, b, h] -> ([s, b, h], None). Router, its losses, shared experts and recomputation are Megatron's; `experts` is an
    evenmoe layer. Where Megatron asserts that experts divide evenly over ranks, here they need not. padding_mask: True
    for padding, as Megatron's code has it; padding is neither routed nor counted, and gets zero from the experts.

    groups: process groups, for releases whose TransformerLayer does not tell them; see `spread_experts`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        assigner: Assigner = AtHome(),
        balancer: Balancer = Unpriced(),
        placement: Placement | None = None,
        groups: ProcessGroupCollection | None = None,
        **more: Any,
    ) -> None:
        check_config(config)
        check_balancer(config, balancer)
        if submodules is None:
            raise ValueError("the layer needs Megatron's submodules for its router; make its spec with spread_experts")
        groups = groups_of(pg_collection, groups)
        if groups.expt_tp.size() > 1:
            raise ValueError(
                f"experts are split over {groups.expt_tp.size()} tensor-parallel ranks; evenmoe keeps an expert whole: "
                f"use expert_tensor_parallel_size=1"
            )
        MegatronModule.__init__(self, config)  # not MoELayer's, which would build dispatcher and experts of its own
        self.submodules, self.layer_number = submodules, layer_number
        self.is_mtp_layer = bool(more.get("is_mtp_layer"))
        self.ep_group, self.tp_group, self.attn_tp_group = groups.ep, groups.tp, groups.tp
        self.token_dispatcher = None
        self.moe_layer_recompute = _recomputes(config, "moe")
        self.shared_experts_recompute = _recomputes(config, "shared_experts")
        self.cudagraph_tensor_store = MoECudaGraphTensorStore()
        self.router = build(submodules.router, config=config, pg_collection=groups, **more)
        self.experts = CoreMoE(config, groups, assigner=assigner, balancer=balancer, placement=placement)
        price(self.router, self._prices)
        self.use_shared_expert = config.moe_shared_expert_intermediate_size is not None
        self.shared_expert_overlap = False
        self.shared_experts = None
        if self.use_shared_expert:
            self.shared_experts = build(
                submodules.shared_experts, config=config, pg_collection=groups, gate=config.moe_shared_expert_gate
            )

    @property
    def local_expert_indices(self) -> list[int]:
        return list(self.experts.experts.expert_ids)

    @property
    def num_local_experts(self) -> int:
        return len(self.local_expert_indices)

    @property
    def _prices(self) -> Prices:
        assert isinstance(self.experts.router, Prices)
        return self.experts.router

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if intermediate_tensors is not None:
            raise ValueError("the layer cannot be resumed half way, as CUDA graphs of a part of it would")
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("tensor parallelism without sequence parallelism repeats tokens; use sequence_parallel")
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._mix, False, hidden_states, padding_mask), None
        return self._mix(hidden_states, padding_mask), None

    def _mix(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        self._prices.valid_T = valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        shared = self.shared_experts_compute(hidden_states)
        probs_TE, map_TE = self.router(hidden_states, padding_mask)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        out: Tensor = self.experts(x_TD, probs_TE, map_TE, valid_T).view_as(hidden_states)
        return out if shared is None else out + shared


class DispatchedMoELayer(MoELayer):  # type: ignore[misc]
    """Megatron's MoELayer with evenmoe's dispatcher: its own forward, experts and router.

    assigner: one that lets experts visit needs VisitedExperts in the place of SequentialMLP; `spread_experts(...,
    keep_layer=True)` sees to it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        assigner: Assigner = AtHome(),
        groups: ProcessGroupCollection | None = None,
        **more: Any,
    ) -> None:
        check_config(config)
        groups = groups_of(pg_collection, groups)
        super().__init__(config, submodules, layer_number, groups, **taken_by(MoELayer, more))
        self.token_dispatcher = EvenDispatcher(
            self.num_local_experts, self.local_expert_indices, config, groups, assigner=assigner
        )
        if not isinstance(self.router, PricedRouter):  # which repeats its choice in a recomputation as it is
            price(self.router, self.token_dispatcher.reader)
        if isinstance(self.experts, VisitedExperts):
            self.experts.dispatcher = self.token_dispatcher
        elif not isinstance(assigner, AtHome):
            raise ValueError(
                f"{assigner} lets experts visit other ranks, which {type(self.experts).__name__} cannot do; use "
                f"VisitedExperts, or CoreMoELayer"
            )


REFUSED = {
    "moe_latent_size": "experts of another width than the model",
    "moe_apply_probs_on_input": "probabilities applied before the experts",
    "moe_pad_expert_input_to_capacity": "experts padded to their capacity",
    "moe_shared_expert_overlap": "shared experts inside the dispatcher",
    "overlap_moe_expert_parallel_comm": "parts of the layer called one by one",
    "delay_wgrad_compute": "weight gradients computed later",
    "fp8": "fp8 experts",
    "fp4": "fp4 experts",
}


def check_config(config: TransformerConfig) -> None:
    """Raise ValueError, naming the option, where a config asks for what the layer does not do."""
    for option, what in REFUSED.items():
        if value := getattr(config, option, None):
            raise ValueError(f"{option}={value!r} asks for {what}, which evenmoe's layer does not do; leave it off")
    if (graphs := getattr(config, "cuda_graph_impl", "none")) != "none":
        raise ValueError(f"cuda_graph_impl={graphs!r}: the layer reads counts on the host; use 'none'")


def _recomputes(config: TransformerConfig, what: str) -> bool:
    return config.recompute_granularity == "selective" and what in config.recompute_modules
