"""A world of members without processes: they follow the protocol to the letter, in any order, and die at any point; so
does the coordinator, and another takes its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe.adoption import Adoption, can_be_adopted
from moe.coordinator import Coordinator
from moe.course import Phase
from moe.epoch import Change, Epoch
from moe.recovery import Inventory
from moe.view import view
from placement import Plan
from tests.moe.live.member import even

EXPERTS = 6


@dataclass
class Sim:
    """held: (layer, expert). staged: the change it is ready for. broken: it has reported and waits. seen: the last view
    it was sent. said: what it told the coordinator."""

    number: int
    epoch: Epoch | None = None
    held: set[tuple[int, int]] = field(default_factory=set)
    staged: Change | None = None
    handled: int = 0
    fresh: bool = False
    broken: int = -1
    seen: Any = None
    said: list[tuple[int, Phase]] = field(default_factory=list)

    def table(self, epoch: Epoch) -> set[tuple[int, int]]:
        return {(layer, e) for layer in range(2) for e in epoch.experts_of(self.number, layer)}


class SimWorld:
    def __init__(self, founders: int, *, reads: bool) -> None:
        self.coordinator, self.reads, self.down = Coordinator(lease=10.0, report=10.0, service="s"), reads, False
        self.members: dict[int, Sim] = {}
        self.seen_epochs: list[int] = []
        self.numbers: list[int] = []
        self.retries = self.ops = 0
        plan = even(EXPERTS, founders)
        for _ in range(founders):
            self.join(plan)
        for sim in self.members.values():
            sim.epoch = self.epoch
            sim.handled = self.epoch.number
            sim.held, sim.seen = sim.table(self.epoch), view(self.coordinator)

    @property
    def epoch(self) -> Epoch:
        assert self.coordinator.epoch is not None
        return self.coordinator.epoch

    def join(self, plan: Plan | None = None) -> None:
        if self.down:
            return
        number = self.coordinator.hello(0.0, plan=plan)
        assert number not in self.members
        self.members[number] = Sim(number)

    def kill(self, turn: int) -> None:
        if len(self.members) > 1:
            number = sorted(self.members)[turn % len(self.members)]
            del self.members[number]
            if not self.down:
                self.coordinator.gone(0.0, number)

    def crash(self) -> None:
        self.down = True

    def restart(self) -> None:
        """As moe.comm.Server does; who does not come back is given up when its lease is over."""
        if not self.down or not any(can_be_adopted(sim.seen) for sim in self.members.values()):
            return
        adoption, self.down = Adoption(0.0, "s"), False
        strangers = [sim.number for sim in self.members.values() if not can_be_adopted(sim.seen)]
        for number in strangers:  # they were told a number, but no more
            del self.members[number]
        for sim in self.members.values():
            said = [{"do": "reached", "epoch": epoch, "phase": int(phase)} for epoch, phase in sim.said]
            adoption.hear(sim.number, sim.seen, said)
        self.coordinator = Coordinator(lease=10.0, report=10.0)
        adoption.into(self.coordinator, 0.0)
        for sim in self.members.values():
            for epoch, phase in sim.said:
                self.coordinator.reached(0.0, sim.number, epoch, phase)
        for member in self.coordinator.roster.living():
            if member.number not in self.members:
                self.coordinator.gone(0.0, member.number)
        for _ in strangers:
            self.join()

    def scale(self, count: int) -> None:
        self.ops += 1
        if self.coordinator.operations.open is None and not self.coordinator.lost and not self.down:
            self.coordinator.scale(0.0, f"op-{self.ops}", count)

    def advance(self, turn: int) -> None:
        """One member does what its view asks for."""
        if not self.members:
            return
        sim = self.members[sorted(self.members)[turn % len(self.members)]]
        if not self.down:
            sim.seen = view(self.coordinator)
        if (now := sim.seen) is None:
            return
        change = None if now["change"] is None else Change.read(now["change"])
        if sim.number in now["report"]:
            number = sim.epoch.number if sim.epoch else 0 if change is None else change.new.number
            if sim.broken < 0:
                self.report(sim, number)
            else:  # perhaps of an epoch that broke too, before this member was in it
                self.report(sim, max(sim.broken, now["epoch"]["number"]))
            return
        if sim.broken >= 0:
            self._resume(sim)
            return
        if sim.staged is not None and (change is None or change.new.number != sim.staged.new.number):
            sim.staged = None
        if change is not None and change.new.number > sim.handled and sim.number in change.union:
            self._stage(sim, change)
        elif sim.epoch is None and sim.staged is not None and now["go"]:
            self._flip(sim)

    def report(self, sim: Sim, number: int) -> None:
        sim.broken, sim.staged, sim.fresh = number, None, False
        held = tuple(tuple(sorted(e for layer, e in sim.held if layer == n)) for n in range(2))
        inventory = Inventory(held_L=held, backup_L=((), ()), reads=self.reads)
        if not self.down:
            self.coordinator.broken(0.0, sim.number, number, inventory)

    def _reached(self, sim: Sim, epoch: int, phase: Phase) -> None:
        sim.said = [(of, what) for of, what in sim.said if of >= sim.seen["epoch"]["number"]] + [(epoch, phase)]
        if not self.down:
            self.coordinator.reached(0.0, sim.number, epoch, phase)

    def step(self, *, torn: int = 0) -> None:
        """Those who serve do a step together; torn: it breaks after so many of them had heard the others' words."""
        serving = [sim for sim in self.members.values() if sim.epoch is not None and sim.broken < 0]
        for epoch in {sim.epoch.number: sim.epoch for sim in serving if sim.epoch is not None}.values():
            together = [sim for sim in serving if sim.epoch is not None and sim.epoch.number == epoch.number]
            if {sim.number for sim in together} != set(epoch.members):
                if any(m not in self.members or self.members[m].broken >= epoch.number for m in epoch.members):
                    self._break(together, epoch.number)
                continue  # else it waits for those who have yet to come
            owned = {cell for sim in together for cell in sim.table(epoch)}
            assert owned == {(layer, e) for layer in range(2) for e in range(EXPERTS)}
            assert all(sim.table(epoch) <= sim.held for sim in together), "rows went to who does not hold the expert"
            self.seen_epochs.append(epoch.number)
            agreed = all(sim.seen["go"] and sim.staged is not None for sim in together)
            for turn, sim in enumerate(together):
                if torn and turn >= torn:
                    self._break([sim], epoch.number)
                    continue
                if sim.fresh:
                    sim.fresh, sim.held = False, sim.table(epoch)
                    self._reached(sim, epoch.number, Phase.FREE)
                if agreed:
                    self._flip(sim)

    def _stage(self, sim: Sim, change: Change) -> None:
        if change.new.number not in self.numbers[-1:]:
            self.numbers.append(change.new.number)
        for t in change.transfer_N:
            if t.destination == sim.number:
                assert t.source not in self.members or (t.layer, t.expert) in self.members[t.source].held
                sim.held.add((t.layer, t.expert))
        sim.staged, sim.handled = change, change.new.number
        self._reached(sim, change.new.number, Phase.PREPARE)
        self._reached(sim, change.new.number, Phase.READY)

    def _flip(self, sim: Sim) -> None:
        assert sim.staged is not None
        new, sim.staged = sim.staged.new, None
        if sim.epoch is not None:
            self._reached(sim, new.number, Phase.FLIP)
        sim.epoch, sim.fresh = (new, True) if sim.number in new.members else (None, False)

    def _break(self, sims: list[Sim], number: int) -> None:
        for sim in sims:
            self.retries += 1
            self.report(sim, number)

    def _resume(self, sim: Sim) -> None:
        epoch = Epoch.read(sim.seen["epoch"])
        if sim.seen["lost"]:
            return
        if epoch.number <= sim.broken:
            self.report(sim, sim.broken)
            return
        sim.broken, sim.handled = -1, epoch.number
        sim.epoch = epoch if sim.number in epoch.members else None
        for restore in sim.seen["restores"]:
            if restore["member"] == sim.number:
                sim.held.add((restore["layer"], restore["expert"]))
        sim.fresh = sim.epoch is not None
