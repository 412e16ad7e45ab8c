"""A host's experts as ours: its own weights, under its own names and in its own layout, run by our `Experts`.

transformers marks the classes whose experts are stacked tensors (`use_experts_implementation`) and says of each whether
it has a gate, biases, transposed weights. That marking, not a list of families, is what is recognised here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe as transformers_moe

from moe.activation import Activation, SwiGLU
from moe.comm import here
from moe.compute import Compute, Fastest
from moe.experts import Experts
from moe.stack import Stack

# What transformers gives to a class that has no gate of its own: act_fn(first half) * second half.
PLAIN_GATE = getattr(transformers_moe, "_default_apply_gate", None)
MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")


@dataclass(frozen=True, kw_only=True, eq=False)
class HostGate:
    """The host's own activation: clamped, interleaved or whatever else. experts: its module, which keeps no weights."""

    experts: nn.Module
    fan: int

    def __call__(self, h_MF: Tensor) -> Tensor:
        apply = self.experts._apply_gate if self.fan == 2 else self.experts.act_fn
        return apply(h_MF)  # type: ignore[operator,no-any-return]

    def __repr__(self) -> str:
        return f"the gate of {type(self.experts).__name__}"


@dataclass(frozen=True, eq=False)
class Host:
    """A module of the host whose experts are run here. It goes on to say what they are, with or without its weights:
    checkpoints put it back for a moment, its own activation lives in it. Not a submodule of what runs them."""

    module: nn.Module

    @property
    def activation(self) -> Activation:
        """Ours where it is silu(gate) * up, halves in this order: that we have faster ways for. Else the host's own."""
        act = getattr(self.module, "act_fn", None)
        plain = PLAIN_GATE is not None and getattr(self.module._apply_gate, "__func__", None) is PLAIN_GATE
        if self.module.has_gate and plain and (act is F.silu or type(act) in (nn.SiLU, SiLUActivation)):
            return SwiGLU()
        return HostGate(experts=self.module, fan=2 if self.module.has_gate else 1)

    @property
    def transposed(self) -> bool:
        return bool(self.module.is_transposed)

    def stack(self) -> Stack:
        """Its own weights, parameters or what stands in for them, in our layout."""
        return layout(
            {field: getattr(self.module, name) for field, name in names_of(self.module).items()}, self.transposed
        )


class HostExperts(Experts):
    """The experts of this rank, taken from a module of the host. The parameters keep the host's names and layout.

    gate_up_proj: [S, fan * hidden, dim], or [S, dim, fan * hidden] if the host transposes; up_proj without a gate;
    down_proj: [S, dim, hidden] or its transpose; the biases if the host has them.
    """

    def __init__(self, host: nn.Module, expert_ids: Sequence[int], compute: Compute = Fastest()) -> None:
        nn.Module.__init__(self)
        self.expert_ids = tuple(int(expert) for expert in expert_ids)
        self.host, self.names, self.compute = Host(host), names_of(host), compute
        for name in self.names.values():
            whole = host._parameters.pop(name)
            assert whole is not None
            own = take(whole.detach(), self.expert_ids)
            self.register_parameter(name, nn.Parameter(own, requires_grad=whole.requires_grad))
        self.activation = self.host.activation

    def reset_parameters(self) -> None:
        raise TypeError("a host's experts start as the host made them; load a checkpoint, or make the model anew")

    def stack(self) -> Stack:
        weight = {field: here(self.get_parameter(name)) for field, name in self.names.items()}
        return layout(weight, self.host.transposed)

    def extra_repr(self) -> str:
        up = self.stack().up
        return f"experts {list(self.expert_ids)}, {up.shape[2]} -> {self.activation}"


def is_fused(module: nn.Module) -> bool:
    """Does it follow the fused-experts layout?"""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3 and all(hasattr(module, mark) for mark in MARKS)


def names_of(host: nn.Module) -> dict[str, str]:
    """Field of Stack -> the host's name of it."""
    up = "gate_up_proj" if host.has_gate else "up_proj"
    names = {"up": up, "down": "down_proj"}
    return names | {"up_bias": f"{up}_bias", "down_bias": "down_proj_bias"} if host.has_bias else names


def layout(weight: Mapping[str, Tensor], transposed: bool) -> Stack:
    """The host's tensors as views in our layout."""
    up, down = weight["up"], weight["down"]
    if transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    return Stack(up, down, weight.get("up_bias"), weight.get("down_bias"))


def sizes_of(host: nn.Module) -> tuple[int, int, int]:
    """-> num_experts, dim, hidden"""
    weight = {field: host.get_parameter(name) for field, name in names_of(host).items()}
    down = layout(weight, bool(host.is_transposed)).down
    return down.shape[0], down.shape[1], down.shape[2]


def problem_with(host: nn.Module) -> str | None:
    """Why these experts cannot be spread, if they cannot."""
    if host.has_post_expert_norm:
        return "norms the output of its experts with weights they share; evenmoe runs experts that end in down_proj"
    if getattr(host, "_is_expert_parallel", False) or any(_is_dtensor(weight) for weight in host.parameters()):
        return "is sharded by transformers' own plan already; load the model without a distributed_config"
    try:
        weights = [host.get_parameter(name) for name in names_of(host).values()]
    except AttributeError as error:
        return f"lacks a weight of the fused-experts layout: {error}"
    if odd := [str(weight.dtype) for weight in weights if not weight.is_floating_point() or weight.itemsize < 2]:
        return f"is quantized ({odd[0]}); load it in bf16, fp16 or fp32"
    known = set(names_of(host).values())
    if more := sorted({name for name, _ in [*host.named_parameters(), *host.named_buffers()]} - known):
        return f"has weights that are not of the fused-experts layout: {', '.join(more)}"
    return None


def take(whole: Tensor, expert_ids: Sequence[int]) -> Tensor:
    """The experts of a stack, copied so that the rest can be freed."""
    if whole.is_meta:
        return whole.new_empty(len(expert_ids), *whole.shape[1:])
    return whole[list(expert_ids)]


def _is_dtensor(weight: Tensor) -> bool:
    return hasattr(weight, "placements") and hasattr(weight, "device_mesh")
