"""Staging: a member's part in a change of epoch, done in a thread while its steps go on. Trimming: what it does after.

PREPARE makes the next epoch's group and one for the crossing, over all that take part. COPY sends and receives experts
in one order for all, so nobody waits in a circle. Whoever has all it needs says READY.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.comm import Ballot, Meeting, Pace, Peers, PeersLostError, receive_parcel, send_parcel
from moe.course import Phase
from moe.epoch import Change, Epoch
from moe.stock import Handover, Stock
from moe.welcome import receive_replicated, send_replicated

Hook = Callable[[Phase], None]


def unhindered(phase: Phase) -> None:
    """The hook of who injects no failure."""


class Staging:
    """peers: of the new epoch, None where this member leaves. arrived: experts here but not yet in their stack, by
    layer and number. ready: nothing is missing."""

    def __init__(
        self,
        change: Change,
        member: int,
        stock: Stock,
        model: nn.Module,
        *,
        meeting: Meeting,
        pace: Pace,
        tell: Callable[[Phase], None],
        failed: Callable[[str], None],
        notify: Callable[[], None],
        at: Hook,
        carry: Callable[[Staging], None],
    ) -> None:
        self.change, self.member, self.stock, self.model = change, member, stock, model
        self.meeting, self.pace, self.tell, self.failed = meeting, pace, tell, failed
        self.at, self.carry = at, carry
        self.handover = Handover(notify)
        self.peers: Peers | None = None
        self.crossing: Peers | None = None
        self.arrived: dict[tuple[int, int], Tensor] = {}
        self.bytes = 0
        self.ready = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"staging-{change.new.number}")
        self._thread.start()

    @property
    def number(self) -> int:
        return self.change.new.number

    def abandon(self) -> None:
        """Nobody waits for the thread: it ends when its peers do, or with their time-out."""
        self.handover.abandon()
        self.peers = self.crossing = None

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._prepare()
            self.tell(Phase.PREPARE)
            self.carry(self)
            self.ready = True
            self.tell(Phase.READY)
            self.at(Phase.READY)
        except Exception as error:
            if not self.handover.abandoned:
                self.failed(f"{type(error).__name__}: {error}")

    def _prepare(self) -> None:
        change, new = self.change, self.change.new
        self.at(Phase.PREPARE)
        if self.member in new.members:
            ballot = Ballot(new.number)
            self.peers = self.meeting.meet(f"epoch-{new.number}", new.rank_of(self.member), len(new.members), ballot)
        if change.transfer_N or change.joiners:
            union = change.union
            self.crossing = self.meeting.meet(f"crossing-{new.number}", union.index(self.member), len(union))

    def hand_over(self, layer: int) -> None:
        """What came is put behind what is there. Until it is taken it counts among what arrived."""
        arrived = {expert: row_B for (where, expert), row_B in self.arrived.items() if where == layer}
        if arrived:
            ids = (*self.stock.layers[layer].experts.expert_ids, *arrived)
            self.handover.offer(layer, ids, self.stock.restack(layer, ids, arrived))
            for expert in arrived:
                del self.arrived[layer, expert]


@torch.no_grad()
def in_background(staging: Staging) -> None:
    """COPY, while steps go on. For weights that do not change."""
    change, member, crossing = staging.change, staging.member, staging.crossing
    stock, pace, union = staging.stock, staging.pace, staging.change.union
    if crossing is None:
        staging.at(Phase.COPY)
        return
    for source, joiner in change.welcomes:
        if member == source:
            staging.bytes += send_replicated(staging.model, union.index(joiner), crossing, pace)
        elif member == joiner:
            receive_replicated(staging.model, union.index(source), crossing, pace)
    mine = [t for t in change.transfer_N if member in (t.source, t.destination)]
    for layer in range(len(stock.layers)):
        for t in (t for t in mine if t.layer == layer):
            if member == t.source:
                row_B = stock.pack(layer, t.expert)
                send_parcel(row_B, union.index(t.destination), crossing, pace)
                staging.bytes += len(row_B)
            else:
                size = stock.parcel_bytes(layer)
                row_B = receive_parcel(size, union.index(t.source), crossing, pace, stock.device)
                staging.arrived[layer, t.expert] = row_B
            if t is mine[0]:
                staging.at(Phase.COPY)
        staging.hand_over(layer)
    if not mine:
        staging.at(Phase.COPY)


def later(staging: Staging) -> None:
    """Nothing yet: experts travel at the boundary, where everybody changes over."""
    staging.at(Phase.COPY)


class Trimming:
    """After a full step in an epoch: every layer's stack as its table has it, made in the background. Then the backups.

    keep: the backups that are to stay, once they are there; None where none were made. problem: why, if so.
    """

    def __init__(
        self,
        epoch: Epoch,
        member: int,
        stock: Stock,
        notify: Callable[[], None],
        then: Callable[[], set[tuple[int, int]] | None],
    ) -> None:
        self.epoch, self.member, self.stock, self.then = epoch, member, stock, then
        self.keep: set[tuple[int, int]] | None = None
        self.handover = Handover(notify)
        self.problem = ""
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"trimming-{epoch.number}")
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def abandon(self) -> None:
        self.handover.abandon()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            for layer, held in enumerate(self.stock.held_L):
                ids = self.epoch.experts_of(self.member, layer)
                if ids != held:
                    self.handover.offer(layer, ids, self.stock.restack(layer, ids, {}))
            self.keep = self.then()
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
            if not self.handover.abandoned and not isinstance(error, PeersLostError):
                raise
