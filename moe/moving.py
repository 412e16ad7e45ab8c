"""move_experts: experts change ranks between two steps, with everything that belongs to them.

Weights, fp32 copies, moments and counts of steps go together, wave by wave. After each wave every layer is whole, and
all ranks agree, so training goes on from any of them.

Where each expert sees the rows it would have seen, which is so with AtHome, the run that moved its experts is the run
that never did, to the bit. On a CPU that takes rows of a multiple of 16 bytes: a matrix whose rows lie elsewhere in
memory may else be multiplied in another order, and the last bit differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.belongings import Belongings, layers_of, packed, padded_bytes, restacked
from moe.comm import EVERYONE, Everyone, Group, Peers, gather_counts, gather_objects, ship
from moe.layer import MoE
from placement import Migration, Plan, Wave, as_given, migrate


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What one call of move_experts did, on all ranks together, and how many moves are left."""

    moves: int
    bytes: int
    left: int

    @property
    def done(self) -> bool:
        return self.left == 0


def plan_of(model: nn.Module) -> Plan:
    """Where the experts of a model live now."""
    return Plan(placement_L=tuple(layer.placement for layer in layers_of(model).values()))


@torch.no_grad()
def move_experts(
    model: nn.Module,
    target: Plan,
    optimizer: Optimizer | None = None,
    *,
    most_bytes: float = math.inf,
    spare: int = 1,
    group: Group | Everyone = EVERYONE,
) -> Moved:
    """Take the experts of a model a step towards a plan; call it between two steps, without gradients, on every rank.

    target: a layer for each of the model's, on its ranks as they are named. most_bytes: what a rank may send or receive
    in this call, so that a step boundary takes a bounded time; call again, with the same target, while `left` is not 0.
    spare: experts of a layer that a rank may hold for a moment beyond what it holds before or after.

    What cannot be is one error on every rank, and nothing moves.
    """
    peers = Peers.of(group)
    layers = list(layers_of(model).values())
    migration, problem = None, ""
    terms: dict[str, Any] = {}
    portion: tuple[Wave, ...] = ()
    try:
        migration, terms = _prepared(layers, target, optimizer, spare)
        portion = next(migration.boundaries(most_bytes), ())
    except ValueError as error:
        problem = str(error)
    _agree(problem, terms | {"setting of most_bytes": most_bytes}, peers)
    assert migration is not None
    for wave in portion:
        _carry_out(wave, layers[wave.layer], optimizer, migration.byte_L[wave.layer])
    moves = sum(len(wave.move_N) for wave in portion)
    moved_bytes = sum(len(wave.move_N) * migration.byte_L[wave.layer] for wave in portion)
    return Moved(moves=moves, bytes=moved_bytes, left=migration.moves - moves)


def _prepared(
    layers: Sequence[MoE], target: Plan, optimizer: Optimizer | None, spare: int
) -> tuple[Migration, dict[str, Any]]:
    """The whole migration, and what all ranks must agree on for it to be the same everywhere."""
    for number, layer in enumerate(layers):
        for name, weight in layer.experts.named_parameters():
            if weight.grad is not None:
                raise ValueError(
                    f"{name} of layer {number} has a gradient, which would be lost; call zero_grad() first"
                )
            if optimizer is not None and not any(weight is w for g in optimizer.param_groups for w in g["params"]):
                raise ValueError(f"the optimiser does not hold {name} of layer {number}; give the one that does")
        if layer.peers.size != target.ranks:
            raise ValueError(f"the plan is for {target.ranks} ranks; layer {number} lives on {layer.peers.size}")
    running = Plan(placement_L=tuple(layer.placement for layer in layers))
    belongings = [Belongings.of(layer, optimizer) for layer in layers]
    aimed = Plan(placement_L=target.placement_L, topology=target.topology)
    weights = tuple(max(each.expert_bytes, 1) for each in belongings)
    migration = migrate(running, aimed, byte_L=weights, spare=spare, naming=as_given)
    lines = [{name: (str(t.dtype), t.shape[1:]) for name, t in each.stacked.items()} for each in belongings]
    numbers = [{name: float(number) for name, number in each.common.items()} for each in belongings]
    terms = {
        "plan": target.fingerprint,
        "running plan": running.fingerprint,
        "machine of the plan": repr(target.topology),
        "setting of spare": spare,
        "tensors that belong to an expert": lines,
        "optimiser's counts": numbers,
    }
    return migration, terms


def _agree(problem: str, terms: Mapping[str, Any], peers: Peers) -> None:
    """All ranks go on, or all raise the same error."""
    digests = {name: hashlib.sha256(repr(term).encode()).hexdigest() for name, term in terms.items()}
    said = gather_objects((problem, digests), peers)
    if problems := [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(said) if problem]:
        alike = len({problem for problem, _ in said}) == 1
        raise ValueError(f"nothing moved: {said[0][0] if alike else '; '.join(problems)}")
    for name in digests:
        others = [rank for rank, (_, theirs) in enumerate(said) if theirs[name] != said[0][1][name]]
        if others:
            raise ValueError(f"nothing moved: the {name} differs between rank 0 and ranks {others}")


def _carry_out(wave: Wave, layer: MoE, optimizer: Optimizer | None, expert_bytes: int) -> None:
    """One wave of one layer. All that can fail comes first; nobody changes anything before all ranks are that far."""
    rank, size = layer.peers.rank, layer.peers.size
    stacked, slot_of = Belongings.of(layer, optimizer).stacked, _slots(layer)
    leaving = sorted((move for move in wave.move_N if move.source == rank), key=lambda m: (m.destination, m.expert))
    coming = sorted((move for move in wave.move_N if move.destination == rank), key=lambda m: (m.source, m.expert))
    rows = [packed(stacked, slot_of[move.expert], expert_bytes) for move in leaving]
    width = padded_bytes(expert_bytes)
    row_NB = torch.stack(rows) if rows else layer.experts.up.new_empty(0, width, dtype=torch.uint8)
    send_R = [sum(move.destination == other for move in leaving) for other in range(size)]
    recv_R = [sum(move.source == other for move in coming) for other in range(size)]
    row_MB, damaged = ship(row_NB, send_R, recv_R, layer.peers)
    arrived = {move.expert: row_B for move, row_B in zip(coming, row_MB)}
    ids = wave.after.experts_of(rank).tolist()
    fresh: dict[str, Tensor] = {}
    short = torch.zeros_like(damaged)
    try:
        fresh = dict(restacked(stacked, slot_of, arrived, ids))
    except RuntimeError:  # out of memory, on a GPU a kind of it
        short += 1
    found_RX = gather_counts(torch.stack([damaged, short]), layer.peers)
    if found_RX.any():
        damaged_N, short_N = (np.flatnonzero(found_R).tolist() for found_R in found_RX.T)
        raise RuntimeError(
            f"experts were damaged on their way to ranks {damaged_N}, and ranks {short_N} had no memory for them; this "
            f"wave is void, all before it are whole"
        )
    layer.rehome(wave.after, {name: fresh[name] for name, _ in layer.experts.named_parameters()})
    if optimizer is not None:
        for name, weight in layer.experts.named_parameters():
            state = optimizer.state.get(weight, {})
            state.update({key: fresh[f"{name}.{key}"] for key in state if f"{name}.{key}" in fresh})


def _slots(layer: MoE) -> dict[int, int]:
    return {expert: slot for slot, expert in enumerate(layer.experts.expert_ids)}
