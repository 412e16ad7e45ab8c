"""What DeepSpeed must know of a layer: it is one of its own, its experts are not everybody's, and what to call them.

DeepSpeed asks three questions. Is a module a `deepspeed.moe.layer.MoE`? Then there are groups of experts at all, and
checkpoints are written by expert. Is `allreduce` of a parameter False? Then it is broadcast, reduced and partitioned
over the ranks of its `group_name` that hold the same experts, and no others. Does its name in the state dict hold
`deepspeed_moe.experts.deepspeed_experts.<number>`? Then it goes to the file of that number: rank in the group times
experts on a rank, plus slot. Which expert it is, our checkpoints say beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from moe.belongings import dotted, layers_of
from moe.integrations.deepspeed.groups import group_name, is_deepspeeds
from moe.layer import MoE
from placement import Placement

NUMBERED = "deepspeed_moe.experts.deepspeed_experts"
ORDER = "deepspeed_order"  # not "expert...": by that word DeepSpeed tells what is an expert's


class Marked(MoE):
    """What a layer does differently under an engine; comes before the layer's own class."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The engine calls it while it is made. The groups are there already."""
        if use_data_before_expert_parallel_:
            raise ValueError(
                "use_data_before_expert_parallel_ would group other ranks than those the layers were built with; "
                "leave it out of the DeepSpeed config"
            )

    def rehome(self, placement: Placement, weights: Mapping[str, Tensor]) -> None:
        raise ValueError(
            "under a DeepSpeed engine experts stay where they are: ZeRO keeps their weights and states by rank; "
            "save with moe.checkpoint and load into a model that is placed otherwise"
        )


def mark(model: nn.Module) -> None:
    """Make every MoE layer known to DeepSpeed, in place. Its groups are made where it has none of that size."""
    layers = layers_of(model)
    for name, layer in layers.items():
        if (problem := _problem(layer)) is not None:
            raise ValueError(f"{name or 'the layer'} {problem}")
    for layer in layers.values():
        if not isinstance(layer, Marked):
            layer.__class__ = _marked(type(layer))
        known: Any = layer
        known.expert_group_name, known.ep_size = group_name(layer.peers.size), layer.peers.size
        known.num_experts, known.num_local_experts = layer.config.num_experts, len(layer.experts.expert_ids)
        for weight in layer.experts.parameters():
            foreign: Any = weight
            foreign.allreduce, foreign.group_name = False, group_name(layer.peers.size)


@contextmanager
def named_by_number(model: nn.Module, *, weights_alone: bool = True) -> Iterator[None]:
    """Within it, a state dict has the experts under DeepSpeed's names, and loading one takes them back.

    weights_alone: nothing else is loaded that goes by expert.
    """
    layers = layers_of(model)
    with ExitStack() as hooks:
        for layer in layers.values():
            handle = layer.register_state_dict_post_hook(_number)  # type: ignore[no-untyped-call]
            hooks.callback(handle.remove)
        hooks.callback(model.register_load_state_dict_pre_hook(_Unnumber(layers, weights_alone)).remove)  # type: ignore[no-untyped-call]
        yield


def is_numbered(key: str) -> bool:
    return f"{NUMBERED}." in key


def _problem(layer: MoE) -> str | None:
    expert_RS, peers = layer.placement.expert_RS, layer.peers
    if (expert_RS < 0).any() or expert_RS.size != layer.config.num_experts:
        slots_R = [len(layer.placement.experts_of(rank)) for rank in range(peers.size)]
        return (
            f"has {layer.config.num_experts} experts, {slots_R} of them on each rank; DeepSpeed needs equally many on "
            f"every rank, and each once"
        )
    if not is_deepspeeds(peers):
        return (
            f"was built with a group of {peers.size} ranks that DeepSpeed would not put together; build it with "
            f"group=moe.integrations.deepspeed.expert_group({peers.size})"
        )
    return None


def _marked(kind: type[MoE]) -> type[MoE]:
    return type(kind.__name__, (Marked, kind, DeepSpeedMoE), {"__doc__": kind.__doc__, "__module__": kind.__module__})


def _number(layer: MoE, state: MutableMapping[str, Tensor], prefix: str, _: Any) -> None:
    for name, _weight in layer.experts.named_parameters():
        for slot, line in enumerate(state.pop(f"{prefix}experts.{name}")):
            state[f"{prefix}{NUMBERED}.{slot}.{name}"] = line
    state[prefix + ORDER] = _order(layer)


def _order(layer: MoE) -> Tensor:
    return torch.as_tensor(layer.placement.expert_RS.copy(), dtype=torch.int64)


class _Unnumber:
    """A hook of the whole model, so that what does not fit changes nothing."""

    def __init__(self, layers: Mapping[str, MoE], weights_alone: bool) -> None:
        self.layers, self.weights_alone = layers, weights_alone

    def __call__(self, model: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
        for name, layer in self.layers.items():
            problem = _misfit(state.pop(prefix + dotted(name, ORDER), None), _order(layer), self.weights_alone)
            if problem is not None:
                raise ValueError(f"{name or 'the layer'}: the checkpoint {problem}")
        for name, layer in self.layers.items():
            slots = range(len(layer.experts.expert_ids))
            for leaf, _weight in layer.experts.named_parameters():
                lines = [state.pop(f"{prefix}{name}.{NUMBERED}.{slot}.{leaf}") for slot in slots]
                state[prefix + dotted(name, "experts", leaf)] = torch.stack(lines)


def _misfit(saved_RS: Tensor | None, order_RS: Tensor, weights_alone: bool) -> str | None:
    """Why the numbers in a checkpoint are not those of this layer's experts, if so."""
    if saved_RS is None:
        return "does not say which experts its numbers mean; no engine of moe.integrations.deepspeed wrote it"
    if saved_RS.flatten().tolist() != order_RS.flatten().tolist():
        return (
            f"has experts {saved_RS.tolist()} by rank, the model {order_RS.tolist()}; DeepSpeed's files go by place: "
            f"use moe.checkpoint.save(folder, engine.module) and engine.load_weights(folder), or build both with "
            f"placement=Placement(expert_RS=numpy.arange(num_experts).reshape(ep_size, -1)), which fits any ep_size"
        )
    if len(saved_RS) != len(order_RS) and not weights_alone:
        return (
            f"was written with ep_size={len(saved_RS)}, the model has {len(order_RS)}, and DeepSpeed keeps the "
            f"optimiser's states by rank; load the weights alone: load_module_only=True"
        )
    return None
