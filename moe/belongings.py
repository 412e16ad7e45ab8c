"""What belongs to an expert: its weights, and what the optimiser keeps for them.

An optimiser keeps tensors beside a weight [S, ...]: moments, fp32 copies. Those with a line for each slot belong to the
experts in the slots. Numbers, such as the count of steps, it keeps once for all experts of a weight on a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.comm import WORD
from moe.layer import MoE


@dataclass(frozen=True, kw_only=True, eq=False)
class Belongings:
    """Of one layer's experts on this rank, by name: "up" a weight, "up.exp_avg" what the optimiser keeps for it.

    stacked: [S, ...], a line for each slot. common: numbers, one for all slots.
    """

    stacked: dict[str, Tensor]
    common: dict[str, Tensor]

    @classmethod
    def of(cls, layer: MoE, optimizer: Optimizer | None) -> Belongings:
        stacked: dict[str, Tensor] = {}
        common: dict[str, Tensor] = {}
        slots = len(layer.experts.expert_ids)
        for name, weight in layer.experts.named_parameters():
            stacked[name] = weight.detach()
            for key, value in kept_for(weight, optimizer).items():
                if value.ndim == 0:
                    common[f"{name}.{key}"] = value
                elif len(value) == slots:
                    stacked[f"{name}.{key}"] = value
                else:
                    raise ValueError(
                        f"the optimiser keeps {key!r} {list(value.shape)} for the {slots} experts of {name!r}; "
                        f"only numbers, and tensors with a line for each expert, can be told apart by expert"
                    )
        return cls(stacked=stacked, common=common)

    @property
    def expert_bytes(self) -> int:
        """What one expert weighs."""
        return sum(line_bytes(tensor) for tensor in self.stacked.values())


def kept_for(weight: Tensor, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """What an optimiser keeps for a weight, numbers as tensors."""
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            kept[key] = value.detach()
        elif isinstance(value, int | float):
            kept[key] = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        elif value is not None:
            raise ValueError(f"the optimiser keeps {key!r}, a {type(value).__name__}; only tensors and numbers travel")
    return kept


def line_bytes(tensor: Tensor) -> int:
    return tensor.shape[1:].numel() * tensor.element_size()


def packed(stacked: Mapping[str, Tensor], slot: int, expert_bytes: int) -> Tensor:
    """All that belongs to an expert as bytes, filled up to whole words."""
    device = next(iter(stacked.values())).device
    parts = [stack[slot].to(device).contiguous().reshape(-1).view(torch.uint8) for stack in stacked.values()]
    return torch.cat([*parts, parts[0].new_zeros(padded_bytes(expert_bytes) - expert_bytes)])


def restacked(
    stacked: Mapping[str, Tensor], slot_of: Mapping[int, int], arrived: Mapping[int, Tensor], ids: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Every stack anew, in the order of ids: who was here before, and who arrived."""
    start = 0
    for name, stack in stacked.items():
        fresh = stack.new_empty(len(ids), *stack.shape[1:])
        end = start + stack.shape[1:].numel() * stack.element_size()
        for slot, expert in enumerate(ids):
            if expert in arrived:
                fresh[slot] = arrived[expert][start:end].clone().view(stack.dtype).view(stack.shape[1:])
            else:
                fresh[slot] = stack[slot_of[expert]]
        start = end
        yield name, fresh


def padded_bytes(expert_bytes: int) -> int:
    """Filled up to whole words, as it travels."""
    return -(-expert_bytes // WORD) * WORD


def layers_of(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers by their names, each once. Their experts must be plain tensors, which have a line for each."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError("the model has no MoE layer")
    for layer in layers.values():
        layer.experts.check_whole()
    return layers


def dotted(*parts: str | int) -> str:
    """A name made of its parts; a module that has none is left out."""
    return ".".join(str(part) for part in parts if part != "")
