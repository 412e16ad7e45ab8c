"""Snapshot: a member's part of a training run as it was between two steps, in host memory, to go back to it.

All that a step changes: what every rank has (weights, prices, statistics), its own experts, what the optimiser keeps
for either, the optimiser's settings, and torch's generators of random numbers. Besides, packed, experts of others that
this member keeps for them, with all that belongs to an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.belongings import Belongings, layers_of, restacked
from moe.kept import others
from moe.layer import MoE
from moe.named import replicated
from moe.recovery import Saved

Lines = dict[str, Tensor]


class Snapshot:
    """saved: when it was, and what is in it. row_B: experts kept for others, by layer and number."""

    @torch.no_grad()
    def __init__(self, saved: Saved, model: nn.Module, optimizer: Optimizer, room: Snapshot | None) -> None:
        """room: one that is not needed any more; it is written over. On a GPU the copies are only under way when this
        returns; `finish` waits for them."""
        layers = layers_of(model)
        self.saved = saved
        self.row_B: dict[tuple[int, int], Tensor] = {}
        self._device = next(iter(layers.values())).experts.up.device
        self._model: Lines = _copied(replicated(model), {} if room is None else room._model)
        self._kept: dict[str, Lines] = {}
        self._experts: dict[str, Lines] = {}
        self._numbers: dict[Tensor, dict[str, Any]] = {}
        for name, weight in others(model):
            lines = {key: value for key, value in optimizer.state.get(weight, {}).items() if _is_line(value)}
            self._kept[name] = _copied(lines, {} if room is None else room._kept[name])
            self._numbers[weight] = _numbers_of(optimizer, weight)
        for name, layer in layers.items():
            stacked = Belongings.of(layer, optimizer).stacked
            self._experts[name] = _copied(stacked, {} if room is None else room._experts[name])
            self._numbers |= {weight: _numbers_of(optimizer, weight) for weight in layer.experts.parameters()}
        self._settings = [
            {key: deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._luck = torch.get_rng_state()
        self._luck_there = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def keep(self, cell: tuple[int, int], row_B: Tensor, room: Snapshot | None) -> None:
        """An expert of somebody else's."""
        self.row_B[cell] = _on_host(row_B, None if room is None else room.row_B.get(cell))

    def finish(self) -> None:
        """Everything is in host memory."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.no_grad()
    def put_back(self, model: nn.Module, optimizer: Optimizer, ids_L: Sequence[tuple[int, ...]]) -> None:
        """The model and its optimiser as they were, but with these experts; each was this member's or is kept here."""
        for name, tensor in replicated(model).items():
            tensor.copy_(self._model[name])
        for name, weight in others(model):
            self._set_state(optimizer, weight, self._kept[name])
        for number, (name, layer) in enumerate(layers_of(model).items()):
            self._put_back_experts(number, layer, self._experts[name], optimizer, ids_L[number])
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            for key, value in settings.items():
                _set(group, key, value, self._device)
        torch.set_rng_state(self._luck)
        if self._luck_there is not None:
            torch.cuda.set_rng_state(self._luck_there, self._device)

    def _put_back_experts(
        self, number: int, layer: MoE, stacked: Lines, optimizer: Optimizer, ids: tuple[int, ...]
    ) -> None:
        """Optimiser and weights together: who is not in the stack of then is in the rows."""
        slot_of = {expert: slot for slot, expert in enumerate(self.saved.held_L[number])}
        rows = {expert: self.row_B[number, expert] for expert in ids if expert not in slot_of}
        fresh = {key: stack.to(self._device) for key, stack in restacked(stacked, slot_of, rows, ids)}
        parts = dict(layer.experts.named_parameters())
        layer.experts.rehouse(ids, {part: fresh[part] for part in parts})
        for part, weight in parts.items():
            lines = {key.removeprefix(f"{part}."): stack for key, stack in fresh.items() if key.startswith(f"{part}.")}
            self._set_state(optimizer, weight, lines)

    def _set_state(self, optimizer: Optimizer, weight: Tensor, lines: Mapping[str, Tensor]) -> None:
        """What the optimiser keeps for a weight, and nothing else: before its first step it keeps nothing."""
        wanted = {**lines, **self._numbers[weight]}
        if not wanted:
            optimizer.state.pop(weight, None)
            return
        state = optimizer.state[weight]
        for key in state.keys() - wanted.keys():
            del state[key]
        for key, value in wanted.items():
            _set(state, key, value, weight.device)


def _copied(tensors: Mapping[str, Tensor], room: Mapping[str, Tensor]) -> Lines:
    return {name: _on_host(tensor, room.get(name)) for name, tensor in tensors.items()}


def _on_host(tensor: Tensor, room: Tensor | None) -> Tensor:
    if room is None or not _alike(room, tensor):
        room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return room.copy_(tensor, non_blocking=True)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _is_line(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _numbers_of(optimizer: Optimizer, weight: Tensor) -> dict[str, Any]:
    """They are small, and stay on their device: some optimisers count there, some on the host."""
    state = optimizer.state.get(weight, {})
    return {key: deepcopy(value) for key, value in state.items() if not _is_line(value)}


def _set(place: MutableMapping[str, Any], key: str, value: Any, device: torch.device) -> None:
    """Into the tensor that is there, if it is like the new one: others may refer to it."""
    there = place.get(key)
    if isinstance(value, Tensor) and isinstance(there, Tensor) and _alike(there, value):
        there.copy_(value)
    elif _is_line(value):
        place[key] = value.to(device, copy=True)
    else:
        place[key] = deepcopy(value)
