"""What an optimiser keeps, by the names of what it keeps it for: <parameter>.<what>, <layer>.experts.<expert>.<...>."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.belongings import Belongings, dotted, kept_for, layers_of
from moe.comm import Stored


def kept_to_save(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """This rank's part: for what all ranks have, and for the experts at home here."""
    tensors: dict[str, Tensor] = {}
    for name, weight in others(model):
        tensors |= {dotted(name, key): value for key, value in kept_for(weight, optimizer).items()}
    for name, layer in layers_of(model).items():
        belongings, at_home = Belongings.of(layer, optimizer), layer.expert_state()
        for slot, expert in enumerate(layer.experts.expert_ids):
            if expert not in at_home:
                continue
            lines = {key: stack[slot] for key, stack in belongings.stacked.items() if "." in key}
            tensors |= {dotted(name, "experts", expert, key): line for key, line in (lines | belongings.common).items()}
    return tensors


def kept_to_load(model: nn.Module, optimizer: Optimizer, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Makes room in the optimiser for all that is stored. -> what this rank needs but the numbers, in that room"""
    tensors: dict[str, Tensor] = {}
    owned = _owned(optimizer)
    for name, weight in others(model):
        if id(weight) in owned:
            shapes = {key: stored[dotted(name, key)] for key in _keys(name, stored) if stored[dotted(name, key)].shape}
            optimizer.state[weight] = {key: _room(info, weight) for key, info in shapes.items()}
            tensors |= {dotted(name, key): optimizer.state[weight][key] for key in shapes}
    for name, layer in layers_of(model).items():
        ids = layer.experts.expert_ids
        for part, weight in layer.experts.named_parameters():
            if id(weight) not in owned:
                continue
            first = dotted(name, "experts", 0, part)
            shapes = {
                key: stored[dotted(first, key)] for key in _keys(first, stored) if stored[dotted(first, key)].shape
            }
            state = optimizer.state[weight] = {key: _room(info, weight, len(ids)) for key, info in shapes.items()}
            for key, stack in state.items():
                tensors |= {dotted(name, "experts", e, part, key): stack[slot] for slot, e in enumerate(ids)}
    return tensors


def numbers_of(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Room for every number that is stored, of all experts: they are few bytes, and one rank's must be alike."""
    return {name: torch.zeros((), dtype=info.dtype) for name, info in stored.items() if not info.shape}


def unequal_numbers(model: nn.Module, numbers: Mapping[str, Tensor]) -> list[str]:
    """A rank keeps one number for all its experts of a weight; they can live anywhere only if theirs are alike."""
    faults = []
    for name, layer in layers_of(model).items():
        for part, _ in layer.experts.named_parameters():
            names = [dotted(name, "experts", expert, part) for expert in range(layer.config.num_experts)]
            for key in _keys(names[0], numbers):
                values = {float(numbers[dotted(each, key)]) for each in names if dotted(each, key) in numbers}
                if len(values) > 1:
                    faults.append(
                        f"the experts of {dotted(name, 'experts', part)} have {key} {sorted(values)}, not one"
                    )
    return faults


def set_numbers(model: nn.Module, optimizer: Optimizer, numbers: Mapping[str, Tensor], plain: Sequence[str]) -> None:
    """plain: what is no tensor in this optimiser's hands."""
    owned = _owned(optimizer)
    places = [(name, weight) for name, weight in others(model)]
    for name, layer in layers_of(model).items():
        places += [(dotted(name, "experts", 0, part), weight) for part, weight in layer.experts.named_parameters()]
    for name, weight in places:
        for key in _keys(name, numbers) if id(weight) in owned else ():
            settings, number = owned[id(weight)], numbers[dotted(name, key)]
            on_device = settings.get("capturable") or settings.get("fused")
            kept = number.to(weight.device) if on_device else number.clone()
            optimizer.state[weight][key] = number.item() if key in plain else kept


def kept_misfits(model: nn.Module, optimizer: Optimizer, stored: Mapping[str, Stored]) -> list[str]:
    """Every expert must have what the first of its layer has, in the same shapes."""
    if not stored:
        return ["it holds nothing of an optimiser; load the model alone, with optimizer=None"]
    faults, known = [], set()
    owned = _owned(optimizer)
    for name, weight in others(model):
        for key in _keys(name, stored) if id(weight) in owned else ():
            known.add(dotted(name, key))
    for name, layer in layers_of(model).items():
        for part, weight in layer.experts.named_parameters():
            first = dotted(name, "experts", 0, part)
            for key in _keys(first, stored) if id(weight) in owned else ():
                for expert in range(layer.config.num_experts):
                    full = dotted(name, "experts", expert, part, key)
                    known.add(full)
                    if full not in stored:
                        faults.append(f"optimizer.{full} is missing")
                    elif stored[full].shape != stored[dotted(first, key)].shape:
                        faults.append(f"optimizer.{full} has shape {list(stored[full].shape)}, unlike expert 0's")
    return faults + [f"optimizer.{name} is not of this optimiser" for name in stored.keys() - known]


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each group of parameters, as far as JSON can tell them."""
    return [{key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def set_settings(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor) and value is not None:
                group[key].fill_(value)
            elif not isinstance(value, dict):
                group[key] = tuple(value) if isinstance(value, list) else value


def plain_numbers(optimizer: Optimizer) -> list[str]:
    """What the optimiser keeps as a number, not as a tensor."""
    states = optimizer.state.values()
    return sorted({key for state in states for key, value in state.items() if isinstance(value, int | float)})


def others(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are the same on every rank, by name."""
    of_experts = {id(weight) for layer in layers_of(model).values() for weight in layer.experts.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) not in of_experts:
            yield name, weight


def _keys(name: str, stored: Mapping[str, object]) -> list[str]:
    """What is kept for a parameter: the last part of names that start with its own."""
    return [full.removeprefix(name + ".") for full in stored if full.rpartition(".")[0] == name]


def _room(info: Stored, weight: Tensor, slots: int | None = None) -> Tensor:
    shape = info.shape if slots is None else (slots, *info.shape)
    return torch.zeros(shape, dtype=info.dtype, device=weight.device)


def _owned(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    return {id(weight): group for group in optimizer.param_groups for weight in group["params"]}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int | float | str | None) else {"not told": str(type(value))}
