"""Training: a model that is trained, its optimiser, and what all members go back to when one of them dies.

A death may find some members before their optimiser's step and others behind it. So every so many steps, before the
next one may change anything, each member copies its part of the run to host memory, and sends the experts of which it
has the only copy, with all that the optimiser keeps for them, to the member that keeps them. After a death everybody
goes back to the same generation of these backups and does the steps from there on again.

Two generations are kept: the older one is given up only after all have said that they have the newer one whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.backup import nobody, only_copies
from moe.belongings import Belongings, layers_of, packed, padded_bytes
from moe.boundary import cross, has_gradients, refuse_gradients
from moe.comm import Membership, Peers, View, gather_counts, ship
from moe.epoch import Change, Epoch
from moe.recovery import CHECKPOINT, Inventory, Mark, Saved
from moe.snapshot import Snapshot
from moe.stock import Stock
from moe.terms import Terms

PORTION = 2**26
NOBODY = -1


class StepLostError(RuntimeError):
    """Members died, and those left are in different steps, with nothing to go back to."""


class Training:
    """bytes: of backups, sent by this member."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, terms: Terms) -> None:
        self.model, self.optimizer, self.terms = model, optimizer, terms
        self.layers = list(layers_of(model).values())
        self.bytes = 0
        self._begun = False
        self._generations: list[Snapshot] = []

    def inventory(self, stock: Stock) -> Inventory:
        saved_N = tuple(snapshot.saved for snapshot in self._generations)
        nothing = ((),) * len(self.layers)
        return Inventory(held_L=stock.held_L, backup_L=nothing, reads=self.terms.resume is not None, saved_N=saved_N)

    def cross(self, change: Change, member: int, step: int, crossing: Peers) -> tuple[int, int]:
        return cross(change, member, step, self.model, self.optimizer, crossing, self.terms.pace)

    @torch.no_grad()
    def begin(self, epoch: Epoch, step: int, membership: Membership, peers: Peers) -> None:
        """Before every step, on all members, without gradients: a generation of backups, if one is due. And the others
        hear what an expert weighs, once there was a step, in which the optimiser made what it keeps."""
        if self._begun and self.terms.bytes_per_boundary:
            membership.byte_L = tuple(self._byte_L)
        self._begun = True
        last = self._generations[-1].saved.mark if self._generations else Mark(0, 0)
        due = last.epoch != epoch.number or step - last.step >= self.terms.backup_every
        if due and self.terms.backup is not nobody:
            keeper = self.terms.backup(epoch.members, membership.host_of).get(membership.number)
            self._save(Mark(epoch.number, step), NOBODY if keeper is None else epoch.rank_of(keeper), epoch, peers)
            membership.backed = epoch.number

    def _save(self, mark: Mark, keeper: int, epoch: Epoch, peers: Peers) -> None:
        keeper_R, byte_L = self._agreed(keeper, peers)
        wards = [ward for ward, rank in zip(epoch.members, keeper_R) if rank == peers.rank]
        room = self._generations.pop(0) if len(self._generations) == 2 else None
        saved = Saved(
            mark=mark,
            members=epoch.members,
            held_L=tuple(layer.experts.expert_ids for layer in self.layers),
            backup_L=tuple(
                tuple(expert for ward in wards for expert in _only_copies(epoch, ward, number))
                for number in range(len(self.layers))
            ),
        )
        snapshot = Snapshot(saved, self.model, self.optimizer, room)
        damaged = torch.zeros((), dtype=torch.int64, device=self.layers[0].experts.up.device)
        for number, expert_bytes in enumerate(byte_L):
            damaged += self._mirror(number, expert_bytes, epoch, keeper_R, peers, snapshot, room)
        snapshot.finish()
        if not damaged.item():
            self._generations.append(snapshot)
        damaged_R = gather_counts(damaged[None], peers)[:, 0]  # and nobody goes on before all have theirs
        if damaged_R.any():
            raise RuntimeError(
                f"backups of experts were damaged on their way to ranks {damaged_R.nonzero()[0].tolist()}"
            )

    def go_back(self, view: View, epoch: Epoch, member: int, peers: Peers) -> int:
        """To a generation, or to a checkpoint of all, with the experts that the epoch puts here. -> the step"""
        mark = None if view["mark"] is None else Mark(*view["mark"])
        ids_L = [epoch.experts_of(member, number) for number in range(len(self.layers))]
        for weight in self.model.parameters():  # of a step that was cut off
            weight.grad = None
        if mark is not None and all(restore["source"] != CHECKPOINT for restore in view["restores"]):
            self._generations = [snapshot for snapshot in self._generations if snapshot.saved.mark == mark]
            self._generations[0].put_back(self.model, self.optimizer, ids_L)
            return mark.step
        if self.terms.resume is None:
            raise StepLostError(
                "members died in training, and there is no backup that all can go back to; start again from a "
                "checkpoint, and give Terms a backup, or resume, on every member next time"
            )
        self._generations = []
        for layer, ids in zip(self.layers, ids_L, strict=True):
            parts = dict(layer.experts.named_parameters())
            layer.experts.rehouse(ids, {part: w.new_zeros(len(ids), *w.shape[1:]) for part, w in parts.items()})
        step = self.terms.resume(self.model, self.optimizer, peers)
        device = self.layers[0].experts.up.device
        step_R = gather_counts(torch.tensor([step], device=device), peers)[:, 0]
        if (step_R != step).any():
            raise ValueError(f"members resumed from steps {step_R.tolist()}, not from one; let all read one checkpoint")
        return step

    @property
    def _byte_L(self) -> list[int]:
        """What an expert of each layer weighs; 0 where none is here."""
        return [
            padded_bytes(Belongings.of(layer, self.optimizer).expert_bytes) * bool(layer.experts.expert_ids)
            for layer in self.layers
        ]

    def _agreed(self, keeper: int, peers: Peers) -> tuple[list[int], list[int]]:
        """-> every rank's keeper, and what an expert of each layer weighs with all that belongs to it"""
        said = torch.tensor(
            [has_gradients(self.layers), keeper, *self._byte_L], device=self.layers[0].experts.up.device
        )
        said_RX: NDArray[np.int64] = gather_counts(said, peers)
        refuse_gradients(said_RX[:, 0])
        byte_RL = said_RX[:, 2:]
        byte_L = byte_RL.max(axis=0)
        if ((byte_RL != byte_L) & (byte_RL != 0)).any():
            raise ValueError(
                f"an expert weighs another number of bytes on each rank, by layer {byte_RL.tolist()}; use the same "
                f"optimiser everywhere"
            )
        return said_RX[:, 1].tolist(), byte_L.tolist()

    def _mirror(
        self,
        number: int,
        expert_bytes: int,
        epoch: Epoch,
        keeper_R: Sequence[int],
        peers: Peers,
        snapshot: Snapshot,
        room: Snapshot | None,
    ) -> Tensor:
        """A layer's experts to those who keep them, a portion at a time. -> how many were damaged"""
        layer = self.layers[number]
        belongings = Belongings.of(layer, self.optimizer)
        slot_of = {expert: slot for slot, expert in enumerate(layer.experts.expert_ids)}
        alone_R = [
            _only_copies(epoch, ward, number) if keeper != NOBODY else []
            for ward, keeper in zip(epoch.members, keeper_R, strict=True)
        ]
        damaged = torch.zeros((), dtype=torch.int64, device=layer.experts.up.device)
        most = max(1, PORTION // max(expert_bytes, 1))
        for start in range(0, max(map(len, alone_R)), most):
            some_R = [each[start : start + most] for each in alone_R]
            rows = [packed(belongings.stacked, slot_of[e], belongings.expert_bytes) for e in some_R[peers.rank]]
            row_NB = torch.stack(rows) if rows else damaged.new_empty(0, expert_bytes, dtype=torch.uint8)
            send_R = [len(rows) * (keeper_R[peers.rank] == rank) for rank in range(peers.size)]
            recv_R = [len(some) * (keeper == peers.rank) for some, keeper in zip(some_R, keeper_R)]
            row_MB, found = ship(row_NB, send_R, recv_R, peers)
            coming = [expert for some, count in zip(some_R, recv_R) for expert in some[:count]]
            for expert, row_B in zip(coming, row_MB, strict=True):
                snapshot.keep((number, expert), row_B, room)
            damaged += found
            self.bytes += row_NB.numel()
        return damaged


def _only_copies(epoch: Epoch, member: int, number: int) -> list[int]:
    return [expert for layer, expert in only_copies(epoch, member) if layer == number]
