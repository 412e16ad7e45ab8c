"""Experts: the stacked feed-forward networks that a rank holds, run over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe.activation import Activation, SwiGLU
from moe.comm import here, is_shard, put
from moe.compute import Compute, Fastest
from moe.guests import Guests
from moe.stack import Stack
from moe.trip import Trip
from moe.visit import visit


class Experts(nn.Module):
    """The experts of this rank, stacked in the order of expert_ids.

    up: [S, fan * hidden, dim], for SwiGLU the gate's rows first; down: [S, dim, hidden]; biases if asked for. The
    initial weights of an expert depend on torch's seed and its id alone, so any number of ranks starts alike.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        expert_ids: Sequence[int],
        *,
        activation: Activation = SwiGLU(),
        bias: bool = False,
        compute: Compute = Fastest(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.expert_ids = tuple(int(expert) for expert in expert_ids)
        self.activation, self.compute = activation, compute
        shapes: dict[str, tuple[int, ...]] = {"up": (activation.fan * hidden, dim), "down": (dim, hidden)}
        if bias:
            shapes |= {"up_bias": (activation.fan * hidden,), "down_bias": (dim,)}
        for name in Stack._fields:
            self.register_parameter(name, None)
        for name, shape in shapes.items():
            weight = torch.empty(len(self.expert_ids), *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in 1/sqrt(inputs), as nn.Linear, from a generator of each expert's own."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        if self.up.is_meta:
            return
        for slot, expert in enumerate(self.expert_ids):
            generator = torch.Generator("cpu").manual_seed((seed + 0x9E3779B97F4A7C15 * (expert + 1)) % 2**63)
            for name, weight in self.named_parameters():
                bound = (self.up if name.startswith("up") else self.down).shape[2] ** -0.5
                drawn = torch.rand(weight.shape[1:], generator=generator, device="cpu", dtype=torch.float32)
                put(drawn * (2 * bound) - bound, weight, slot, len(self.expert_ids))

    def rehouse(self, expert_ids: Sequence[int], weights: Mapping[str, Tensor]) -> None:
        """Hold other experts from now on. The parameters stay the objects they are, for whoever refers to them."""
        self.check_whole()
        for name, weight in self.named_parameters():
            wanted = (len(expert_ids), *weight.shape[1:])
            if weights[name].shape != wanted or weights[name].dtype != weight.dtype:
                raise ValueError(f"{name} of {len(expert_ids)} experts needs {wanted}, {weight.dtype}; got "
                                 f"{tuple(weights[name].shape)}, {weights[name].dtype}")  # fmt: skip
        for name, weight in self.named_parameters():
            # A graph that somebody still holds keeps the weight's gradient node, which knows the old shape; of a weight
            # that had another type meanwhile, torch makes a new one.
            weight.data = weight.new_empty(0, dtype=torch.float32 if weight.dtype == torch.float64 else torch.float64)
            weight.data = weights[name]
            weight.grad = None
        self.expert_ids = tuple(expert_ids)

    def check_whole(self) -> None:
        """Experts are told apart by their lines in plain tensors."""
        if any(is_shard(weight) for weight in self.parameters()):
            raise ValueError(
                "these experts are DTensors, which stay where they are; save and load them with "
                "torch.distributed.checkpoint, which takes them to any number of ranks"
            )

    def stack(self) -> Stack:
        """What this rank computes with: of a DTensor, its part."""
        up_bias, down_bias = (None if bias is None else here(bias) for bias in (self.up_bias, self.down_bias))
        return Stack(here(self.up), here(self.down), up_bias, down_bias)

    def forward(self, x_TD: Tensor, weight_N: Tensor | None, trip: Trip, own: Stack, guests: Guests) -> Tensor:
        """Tokens to the experts, by whatever way, and the weighted sum of the results back. -> y_TD"""
        dtype = compute_dtype(x_TD)
        return visit(x_TD.to(dtype), weight_N, trip, _cast(own, dtype), guests, self.compute, self.activation)

    def extra_repr(self) -> str:
        return f"experts {list(self.expert_ids)}, {self.up.shape[2]} -> {self.down.shape[2]}, {self.activation}"


class Shared(nn.Module):
    """An ordinary feed-forward network that every token visits besides the experts it chose. Alike on every rank."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: Activation,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, activation.fan * hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down(self.activation(self.up(x_TD)))
        return y_TD


def compute_dtype(row_MD: Tensor) -> torch.dtype:
    """The type of the matmuls: autocast's where it is on, else that of the rows."""
    device = row_MD.device.type
    if torch.is_autocast_enabled(device) and row_MD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return row_MD.dtype


def _cast(stack: Stack, dtype: torch.dtype) -> Stack:
    up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in stack[2:])
    return Stack(stack.up.to(dtype), stack.down.to(dtype), up_bias, down_bias)
