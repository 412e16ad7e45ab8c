"""The tensors of a model by name, each once, however many ranks hold it: an expert's name has its number in it, not its
rank's or slot's."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe.belongings import dotted, layers_of
from moe.comm import Peers, gather_objects, sum_over
from routing import Router

STAT = "stat_"
SHOWN = 5


def tensors_to_save(model: nn.Module, peers: Peers) -> dict[str, Tensor]:
    """What this rank is to save: what all ranks have, and the experts at home here. Statistics of a step that is not
    settled are summed over the ranks.

    Raises on every rank, before anything is written, where an expert is at home nowhere or in two places.
    """
    layers = layers_of(model)
    own = [(name, expert) for name, layer in layers.items() for expert in layer.expert_state()]
    claims = Counter(claim for each in gather_objects(own, peers) for claim in each)
    for name, layer in layers.items():
        homes = [claims[name, expert] for expert in range(layer.config.num_experts)]
        if min(homes) != max(homes) or not homes[0]:  # as many each as there are expert-parallel groups
            raise ValueError(
                f"the experts of {name or 'the layer'} are at home on {homes} ranks, one number each; expected 1: the "
                f"ranks disagree about the placement"
            )
    tensors = replicated(model)
    summed = {name: tensors[name].clone() for name in statistics(model)}
    sum_over(list(summed.values()), peers)
    tensors |= summed
    for name, layer in layers.items():
        for expert, state in layer.expert_state().items():
            tensors |= {dotted(name, "experts", expert, weight): tensor for weight, tensor in state.items()}
    return tensors


def tensors_to_load(model: nn.Module) -> dict[str, Tensor]:
    """What this rank needs, sharing memory with the model: copies of an expert too."""
    tensors = replicated(model)
    for name, layer in layers_of(model).items():
        for weight, stack in layer.experts.named_parameters():
            for slot, expert in enumerate(layer.experts.expert_ids):
                tensors[dotted(name, "experts", expert, weight)] = stack.detach()[slot]
    return tensors


def expected(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the whole model, wherever its experts live."""
    shapes = {name: tuple(tensor.shape) for name, tensor in replicated(model).items()}
    for name, layer in layers_of(model).items():
        for weight, stack in layer.experts.named_parameters():
            for expert in range(layer.config.num_experts):
                shapes[dotted(name, "experts", expert, weight)] = tuple(stack.shape[1:])
    return shapes


def misfits(found: Mapping[str, tuple[int, ...]], model: nn.Module) -> list[str]:
    """What was found, beside what the model wants. Another balancer's statistics are neither wanted nor missed."""
    wanted = expected(model)
    faults = [f"{name} is missing" for name in wanted if name not in found and not _is_stat(name)]
    faults += [f"{name} is not of this model" for name in found if name not in wanted and not _is_stat(name)]
    for name, shape in wanted.items():
        if (other := found.get(name, shape)) != shape:
            why = ": it is transposed" if len(shape) == 2 and other == shape[::-1] else ""
            faults.append(f"{name} has shape {list(other)}, the model's has {list(shape)}{why}")
    return faults


def raise_alike(source: object, faults: Sequence[str], peers: Peers) -> None:
    """One error on every rank, where any of them found a fault."""
    if faults := list(dict.fromkeys(fault for each in gather_objects(list(faults), peers) for fault in each)):
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError(f"{source} does not fit: {'; '.join(faults[:SHOWN])}{more}")


@torch.no_grad()
def keep_sums(model: nn.Module, loaded: Mapping[str, object], peers: Peers) -> None:
    """Statistics were saved as a sum over the ranks: it stays on the first of them; what was not loaded is zero."""
    tensors = replicated(model)
    for name in statistics(model):
        if peers.rank or name not in loaded:
            tensors[name].zero_()


def replicated(model: nn.Module) -> dict[str, Tensor]:
    """What every rank has: the state dict without the experts."""
    of_experts = {
        dotted(name, "experts", weight)
        for name, layer in layers_of(model).items()
        for weight, _ in layer.experts.named_parameters()
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name not in of_experts}


def statistics(model: nn.Module) -> list[str]:
    """What the routers have seen since their prices were settled: other tokens on every rank."""
    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    return [dotted(name, STAT + stat) for name, router in routers for stat in router.stats]


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the numbers, in order."""
    tensor = tensor.detach().cpu().contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,))  # one number may have any stride and be contiguous
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def _is_stat(name: str) -> bool:
    return name.rsplit(".", 1)[-1].startswith(STAT)
