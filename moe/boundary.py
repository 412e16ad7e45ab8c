"""Boundary: experts change members between two steps of training, with all that an optimiser keeps for them.

In training a copy made in the background is stale after the next step, so here everybody waits while experts travel;
a change has as many epochs as it takes for no rank to send or receive more than a portion at once. Who comes gets what
all ranks have, the optimiser's part and its settings included. Sources give up their experts once all have arrived.

The run that moved is the run that never did, to the bit, where each expert sees its rows in the same order: with
AtHome, and a batch that is dealt to the ranks in contiguous parts; and where sums over ranks, such as of a router's
gradient, do not depend on how many ranks there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from moe import kept
from moe.belongings import Belongings, dotted, layers_of, packed, padded_bytes, restacked
from moe.comm import Pace, Peers, Stored, gather_counts, receive_parcel, send_parcel
from moe.epoch import Change
from moe.layer import MoE
from moe.welcome import receive_replicated, receive_tensors, send_replicated, send_tensors


def has_gradients(layers: Sequence[MoE]) -> bool:
    return any(weight.grad is not None for layer in layers for weight in layer.experts.parameters())


def refuse_gradients(left_R: NDArray[np.int64]) -> None:
    """One error on all, if anybody has one: the others would wait for who stops here alone."""
    if left_R.any():
        raise ValueError(
            f"experts of ranks {left_R.nonzero()[0].tolist()} have gradients, which would be lost; end a step with "
            f"optimizer.zero_grad()"
        )


@torch.no_grad()
def cross(
    change: Change, member: int, step: int, model: nn.Module, optimizer: Optimizer, crossing: Peers, pace: Pace
) -> tuple[int, int]:
    """All who take part call, after the same step, without gradients. -> that step, which who comes does not know, and
    the bytes this member sent"""
    layers = list(layers_of(model).values())
    said = torch.tensor([has_gradients(layers), step], device=layers[0].router.price_E.device)
    said_RX = gather_counts(said, crossing)
    refuse_gradients(said_RX[:, 0])
    union, sent = change.union, 0
    for source, joiner in change.welcomes:
        if member == source:
            sent += send_replicated(model, union.index(joiner), crossing, pace)
            sent += _send_kept(model, optimizer, union.index(joiner), crossing, pace)
        elif member == joiner:
            receive_replicated(model, union.index(source), crossing, pace)
            _receive_kept(model, optimizer, union.index(source), crossing, pace)
    arrived: dict[tuple[int, int], Tensor] = {}
    for t in change.transfer_N:
        if member not in (t.source, t.destination):
            continue
        experts, belongings = layers[t.layer].experts, Belongings.of(layers[t.layer], optimizer)
        if member == t.source:
            row_B = packed(belongings.stacked, experts.expert_ids.index(t.expert), belongings.expert_bytes)
            send_parcel(row_B, union.index(t.destination), crossing, pace)
            sent += len(row_B)
        else:
            size, device = padded_bytes(belongings.expert_bytes), experts.up.device
            row_B = receive_parcel(size, union.index(t.source), crossing, pace, device)
            arrived[t.layer, t.expert] = row_B
    gather_counts(torch.zeros(1, dtype=torch.int64, device=layers[0].experts.up.device), crossing)  # all have arrived
    for number, layer in enumerate(layers):
        rows = {expert: row_B for (where, expert), row_B in arrived.items() if where == number}
        _rehouse(layer, optimizer, change.new.experts_of(member, number), rows)
    return int(said_RX[:, 1].max()), sent


def _rehouse(layer: MoE, optimizer: Optimizer, ids: tuple[int, ...], rows: Mapping[int, Tensor]) -> None:
    if ids == layer.experts.expert_ids:
        return
    slot_of = {expert: slot for slot, expert in enumerate(layer.experts.expert_ids)}
    fresh = dict(restacked(Belongings.of(layer, optimizer).stacked, slot_of, rows, ids))
    layer.experts.rehouse(ids, {name: fresh[name] for name, _ in layer.experts.named_parameters()})
    for name, weight in layer.experts.named_parameters():
        state = optimizer.state.get(weight, {})
        state.update({key: fresh[f"{name}.{key}"] for key in state if f"{name}.{key}" in fresh})


def _send_kept(model: nn.Module, optimizer: Optimizer, rank: int, peers: Peers, pace: Pace) -> int:
    """What the optimiser keeps besides the experts' lines, and what it keeps for an expert, so that there is room."""
    found = _as_of_first(model, kept.kept_to_save(model, optimizer))
    about = {
        "stored": {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in found.items()},
        "numbers": {name: tensor.item() for name, tensor in found.items() if tensor.ndim == 0},
        "settings": kept.settings_of(optimizer),
        "plain": kept.plain_numbers(optimizer),
    }
    device = next(model.parameters()).device
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    row_B = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    send_parcel(torch.tensor([len(row_B)], device=device).view(torch.uint8), rank, peers, pace)
    send_parcel(row_B, rank, peers, pace)
    return len(row_B) + send_tensors(_lines(found), rank, peers, pace, device)


def _receive_kept(model: nn.Module, optimizer: Optimizer, rank: int, peers: Peers, pace: Pace) -> None:
    device = next(model.parameters()).device
    size = int(receive_parcel(8, rank, peers, pace, device).view(torch.int64).item())
    about: dict[str, Any] = json.loads(bytes(receive_parcel(size, rank, peers, pace, device).cpu().tolist()))
    stored = {
        name: Stored(tuple(shape), getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in about["stored"].items()
    }
    room = kept.kept_to_load(model, optimizer, stored)
    receive_tensors(_lines(room), rank, peers, pace, device)
    numbers = {name: torch.tensor(value, dtype=stored[name].dtype) for name, value in about["numbers"].items()}
    kept.set_numbers(model, optimizer, numbers, about["plain"])
    kept.set_settings(optimizer, about["settings"])


def _as_of_first(model: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is kept for one of the experts here, under the name of expert 0: all keep the same."""
    renamed: dict[str, Tensor] = {}
    for name, layer in layers_of(model).items():
        for expert in layer.expert_state():
            start = dotted(name, "experts", expert) + "."
            first = dotted(name, "experts", 0) + "."
            renamed |= {first + full.removeprefix(start): t for full, t in found.items() if full.startswith(start)}
            break
    experts = tuple(dotted(name, "experts") + "." for name in layers_of(model))
    return {full: t for full, t in found.items() if not full.startswith(experts)} | renamed


def _lines(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of what all ranks have."""
    return {name: tensor for name, tensor in sorted(found.items()) if tensor.ndim and ".experts." not in f".{name}"}
