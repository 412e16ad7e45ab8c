"""spread_experts: the MoE layers of a Megatron spec, ours."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from moe.integrations.megatron.dispatcher import VisitedExperts
from moe.integrations.megatron.layer import CoreMoELayer, DispatchedMoELayer
from moe.integrations.megatron.router import PricedRouter
from moe.integrations.megatron.versions import module_of, submodules_of
from placement import Placement
from routing import Assigner, AtHome, Balancer, Unpriced


def spread_experts(
    spec: Any,
    *,
    assigner: Assigner = AtHome(),
    balancer: Balancer | None = None,
    placement: Placement | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    keep_layer: bool = False,
) -> Any:
    """A spec of Megatron's, with its MoE layers ours. -> another spec; the one given stays as it is

    spec: of a transformer layer, of a block of layers (TransformerBlockSubmodules), or of a MoELayer. placement: where
    the experts of every layer live, on the ranks of the expert-parallel group; None for Megatron's own order.
    pg_collection: the process groups that the model is given. Megatron-Core 0.16 does not hand them on to a MoE layer
    that is not its own; without, they are those of parallel_state. keep_layer: keep Megatron's layer and experts, and
    replace the dispatcher alone, and the router if there is a balancer; it has no placement but Megatron's.
    """
    if keep_layer and placement is not None:
        raise ValueError("Megatron's own layer knows no placement but its own; use keep_layer=False")
    params: dict[str, Any] = {"assigner": assigner, "groups": pg_collection}
    if not keep_layer:
        params |= {"balancer": balancer or Unpriced(), "placement": placement}
    found, spread = _within(spec, params, balancer if keep_layer else None, keep_layer=keep_layer)
    if not found:
        raise ValueError(
            f"there is no MoELayer in this {type(spec).__name__}; give the spec of a layer, such as "
            f"get_gpt_layer_local_spec(num_experts=...), or of a block of them"
        )
    return spread


def _within(spec: Any, params: dict[str, Any], balancer: Balancer | None, *, keep_layer: bool) -> tuple[int, Any]:
    """-> how many MoE layers were found, and the spec with ours."""
    if _is_moe(spec):
        return 1, _ours(spec, params, balancer, keep_layer=keep_layer)
    if isinstance(spec, TransformerBlockSubmodules):
        each = [_within(layer, params, balancer, keep_layer=keep_layer) for layer in spec.layer_specs]
        return sum(found for found, _ in each), replace(spec, layer_specs=[layer for _, layer in each])
    inner = getattr(getattr(spec, "submodules", None), "mlp", None)
    if not _is_moe(inner):
        return 0, spec
    mlp = _ours(inner, params, balancer, keep_layer=keep_layer)
    return 1, replace(spec, submodules=replace(spec.submodules, mlp=mlp))


def _is_moe(spec: Any) -> bool:
    module = module_of(spec)
    return isinstance(module, type) and issubclass(module, MoELayer)


def _ours(spec: Any, params: dict[str, Any], balancer: Balancer | None, *, keep_layer: bool) -> ModuleSpec:
    if module_of(spec) is not MoELayer:
        raise ValueError(f"the MoE layer of this spec is a {module_of(spec).__name__} already; spread Megatron's own")
    submodules, layer = submodules_of(spec), CoreMoELayer
    if keep_layer:
        layer = DispatchedMoELayer
        if module_of(submodules.experts) is SequentialMLP:
            submodules = replace(submodules, experts=_visited(submodules.experts))
        if balancer is not None:
            submodules = replace(submodules, router=partial(PricedRouter, balancer=balancer))
    metainfo = getattr(spec, "metainfo", {})
    return ModuleSpec(module=layer, submodules=submodules, params=params, metainfo=metainfo)


def _visited(experts: Any) -> Any:
    """The same spec, of VisitedExperts."""
    if isinstance(experts, ModuleSpec):
        return replace(experts, module=VisitedExperts)
    return partial(VisitedExperts, *experts.args, **experts.keywords)
