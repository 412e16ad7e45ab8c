"""Experts of a Megatron-Core model: its MoE layers as ours, or our router and dispatcher in its own.

spec = get_gpt_layer_local_spec(num_experts=64)
spec = spread_experts(spec, assigner=LeastLoaded(headroom=1.05), balancer=LossFree(step=1e-3))
model = GPTModel(config, spec, ...)
"""

from moe.integrations.require import require

require("megatron-core", at_least="0.16", extra="megatron")

from moe.integrations.megatron.dispatcher import EvenDispatcher, VisitedExperts  # noqa: E402
from moe.integrations.megatron.layer import CoreMoELayer, DispatchedMoELayer  # noqa: E402
from moe.integrations.megatron.router import PricedRouter  # noqa: E402
from moe.integrations.megatron.spec import spread_experts  # noqa: E402

__all__ = ["CoreMoELayer", "DispatchedMoELayer", "EvenDispatcher", "PricedRouter", "VisitedExperts", "spread_experts"]
