"""Terms: how a member of a live model takes part, as a value."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.backup import Keepers, nobody
from moe.comm import Meeting, Membership, Pace, Peers
from moe.staging import Hook, unhindered
from placement import Plan

Reader = Callable[[str, int], Mapping[str, Tensor]]
Resume = Callable[[nn.Module, Optimizer, Peers], int]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """device: of the model. timeout: seconds after which a silent peer counts as lost, in steps and on the way; the
    coordinator's `report` must not be shorter. patience: seconds to wait for the coordinator where nothing goes on
    without it. beat: seconds between signs of life; a few must fit a lease. slots: experts of a layer this member can
    hold, 0 for any number. read: (layer's name, expert) -> its tensors, from a checkpoint, for experts of which no
    member has a copy. tries: of a step that fails though nobody died.

    backup: who keeps whose experts in host memory; `other_host`, or `nobody`. All members need the same.

    optimizer: makes the optimiser of a model that is trained. Then experts travel between two steps, at most
    `bytes_per_boundary` of them to or from a rank, 0 for any number; all members need the same. Backups are then made
    before a step, every `backup_every` steps, and after a death all go back to the last; see Training. resume: (model,
    optimiser, peers) -> the step it is at, from a checkpoint of the whole run, where backups do not help.

    at: called when a phase begins, for tests that let a member fail there.
    """

    device: torch.device = torch.device("cpu")
    timeout: float = 30.0
    patience: float = 120.0
    beat: float = 0.5
    slots: int = 0
    pace: Pace = Pace()
    read: Reader | None = None
    backup: Keepers = nobody
    optimizer: Callable[[nn.Module], Optimizer] | None = None
    bytes_per_boundary: int = 0
    backup_every: int = 1
    resume: Resume | None = None
    tries: int = 5
    at: Hook = unhindered

    def __post_init__(self) -> None:
        if self.backup_every < 1:
            raise ValueError(f"backup_every={self.backup_every}; use the steps from a backup to the next, 1 or more")

    def membership(self, address: str | os.PathLike[str], plan: Plan | None) -> Membership:
        """A line to the coordinator. plan: of a founder."""
        return Membership(
            address,
            plan=None if plan is None else plan.to_json(),
            slots=self.slots,
            portion=self.bytes_per_boundary,
            beat=self.beat,
            timeout=self.patience,
        )

    def meeting(self, line: Membership) -> Meeting:
        """Where members find each other: a store beside the coordinator."""
        assert line.view is not None
        store = (line.there, int(line.view["store"]))
        return Meeting(store=store, here=line.here, device=self.device, timeout=self.timeout)
