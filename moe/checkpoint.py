"""Checkpoints of a model and its optimiser, by expert and not by rank: what 4 ranks saved, 1, 3 or 5 can load.

    checkpoint.save("out/step100", model, optimizer)       # every rank calls
    checkpoint.load("out/step100", model, optimizer)       # on any number of ranks, or without a process group
    checkpoint.verify("out/step100", model)                # what is wrong with it, if anything

Names of tensors: model.<name>, and model.<layer>.experts.<expert>.<weight>; optimizer.<the same name>.<what it keeps>.
One more, `about`, is JSON: a checksum of every tensor and the optimiser's settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe import kept, named
from moe.belongings import dotted
from moe.comm import (
    EVERYONE,
    Everyone,
    Folder,
    Group,
    Peers,
    Stored,
    gather_objects,
    read_tensors,
    stored_tensors,
    write_tensors,
)

SCHEMA = "evenmoe.checkpoint/1"
ABOUT = "about"
PORTION = 2**28


def save(
    folder: Folder, model: nn.Module, optimizer: Optimizer | None = None, *, group: Group | Everyone = EVERYONE
) -> None:
    """Into a folder that all ranks see and that is not there yet. Every rank of the group must call."""
    peers = Peers.of(group)
    tensors = _prefixed("model", named.tensors_to_save(model, peers))
    if optimizer is not None:
        tensors |= _prefixed("optimizer", kept.kept_to_save(model, optimizer))
    checks = {name: named.checksum(tensor) for name, tensor in tensors.items()}
    about = {
        "schema": SCHEMA,
        "checks": {name: check for each in gather_objects(checks, peers) for name, check in each.items()},
        "groups": [] if optimizer is None else kept.settings_of(optimizer),
        "plain": [] if optimizer is None else kept.plain_numbers(optimizer),
    }
    text = torch.frombuffer(bytearray(json.dumps(about, sort_keys=True).encode()), dtype=torch.uint8)
    write_tensors({**tensors, ABOUT: text}, folder, peers)


@torch.no_grad()
def load(
    folder: Folder, model: nn.Module, optimizer: Optimizer | None = None, *, group: Group | Everyone = EVERYONE
) -> None:
    """Into a model of the same shapes, wherever its experts live. What does not fit is one error on every rank, and
    nothing is changed."""
    peers, faults = Peers.of(group), []
    stored: dict[str, Stored] = {}
    numbers: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    try:
        stored = stored_tensors(folder)
        about = _about(folder, stored)
        faults = _misfits(stored, model, optimizer)
        if optimizer is not None and not faults:
            numbers = kept.numbers_of(_under("optimizer", stored))
            read_tensors(_prefixed("optimizer", numbers), folder)
            faults = kept.unequal_numbers(model, numbers) + _group_faults(about, optimizer)
    except ValueError as error:
        faults = [str(error)]
    named.raise_alike(folder, faults, peers)

    of_model = _under("model", stored)
    targets = {name: tensor for name, tensor in named.tensors_to_load(model).items() if name in of_model}
    wanted = _prefixed("model", targets)
    if optimizer is not None:
        wanted |= _prefixed("optimizer", kept.kept_to_load(model, optimizer, _under("optimizer", stored)))
        kept.set_numbers(model, optimizer, numbers, about["plain"])
        kept.set_settings(optimizer, about["groups"])
    read_tensors(wanted, folder)
    named.keep_sums(model, targets, peers)


def verify(folder: Folder, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[str, ...]:
    """What is wrong with a checkpoint for this model: experts lost, doubled, transposed, or bytes that are not those
    that were saved. Nothing wrong is (). Reads all of it, a portion at a time, in this process; changes nothing."""
    try:
        stored = stored_tensors(folder)
        checks: dict[str, int] = _about(folder, stored)["checks"]
    except ValueError as error:
        return (str(error),)
    faults = _misfits(stored, model, optimizer)
    saved_as = {check: name for name, check in checks.items()}
    for portion in _portions(stored):
        read_tensors(portion, folder)
        for name, tensor in portion.items():
            check = named.checksum(tensor)
            if check == checks.get(name):
                continue
            if tensor.ndim == 2 and named.checksum(tensor.T) == checks.get(name):
                faults.append(f"{name} is transposed")
            elif check in saved_as:
                faults.append(f"{name} holds what was saved as {saved_as[check]}")
            else:
                faults.append(f"{name} does not hold the bytes that were saved")
    return tuple(faults)


def _portions(stored: Mapping[str, Stored]) -> Iterator[dict[str, Tensor]]:
    """Room for all tensors in turn, never for much more than PORTION bytes."""
    portion: dict[str, Tensor] = {}
    for name in sorted(stored.keys() - {ABOUT}):
        portion[name] = torch.empty(stored[name].shape, dtype=stored[name].dtype)
        if sum(tensor.nbytes for tensor in portion.values()) > PORTION:
            yield portion
            portion = {}
    yield portion


def _misfits(stored: Mapping[str, Stored], model: nn.Module, optimizer: Optimizer | None) -> list[str]:
    shapes = {name: info.shape for name, info in _under("model", stored).items()}
    faults = named.misfits(shapes, model)
    return faults if optimizer is None else faults + kept.kept_misfits(model, optimizer, _under("optimizer", stored))


def _about(folder: Folder, stored: Mapping[str, Stored]) -> dict[str, Any]:
    if ABOUT not in stored:
        raise ValueError(f"{folder} was not written by moe.checkpoint: it does not say what it is")
    text = torch.empty(stored[ABOUT].shape, dtype=torch.uint8)
    read_tensors({ABOUT: text}, folder)
    about: dict[str, Any] = json.loads(bytes(text.tolist()))
    if about["schema"] != SCHEMA:
        raise ValueError(f"{folder} is a {about['schema']}; this version reads {SCHEMA}")
    return about


def _group_faults(about: Mapping[str, Any], optimizer: Optimizer) -> list[str]:
    saved, here = len(about["groups"]), len(optimizer.param_groups)
    return [] if saved == here else [f"its optimiser had {saved} groups of parameters, this one has {here}"]


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {dotted(prefix, name): tensor for name, tensor in tensors.items()}


def _under(prefix: str, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    return {name.removeprefix(f"{prefix}."): info for name, info in stored.items() if name.startswith(f"{prefix}.")}
