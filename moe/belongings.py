"""What belongs to an expert: its weights, and what the optimiser keeps for them.

An optimiser keeps tensors beside a weight [S, ...]: moments, fp32 copies. Those with a line for each slot belong to the
experts in the slots. Numbers, such as the count of steps, it keeps once for all experts of a weight on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
