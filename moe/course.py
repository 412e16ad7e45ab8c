"""Course: how far a change of epoch is, from what its members said.

PREPARE  all that take part build the groups of the next epoch, in the background
COPY     experts travel, in the background; the old epoch serves
READY    everybody has everything: those who serve vote, a word in each step, and change over between two steps
FLIP     the first has changed over
FREE     a member has done a whole step in the new epoch, so all have changed over: what is left over may go
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from moe.epoch import Change


class Phase(IntEnum):
    """IDLE: nothing to do. WAIT: for members to stand by. RECOVER: after a death. LOST: experts are gone for good.
    ADOPT: a coordinator that was started anew hears the members."""

    IDLE = 0
    WAIT = 1
    PREPARE = 2
    COPY = 3
    READY = 4
    FLIP = 5
    FREE = 6
    RECOVER = 7
    LOST = 8
    ADOPT = 9


class Course:
    """A change, and the last phase that each who takes part is done with. go: all were ready once. flipped: one of
    those who serve has changed over, so there is no way back."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.go = self.flipped = False
        self._reached = dict.fromkeys(change.union, Phase.WAIT)

    def hear(self, member: int, phase: Phase) -> None:
        if member in self._reached:
            self._reached[member] = max(self._reached[member], phase)
        if all(reached >= Phase.READY for reached in self._reached.values()):
            self.go = True

    def done(self, living: Collection[int]) -> bool:
        """Everybody who goes on has done a step in the new epoch; or, where nobody goes on, everybody knows."""
        last, members = Phase.FREE, self.change.new.members
        if not members:
            last, members = Phase.FLIP, self.change.old.members
        return self.flipped and all(self._reached[member] >= last for member in members if member in living)

    @property
    def phase(self) -> Phase:
        if self.flipped:
            freed = any(self._reached[member] == Phase.FREE for member in self.change.new.members)
            return Phase.FREE if freed else Phase.FLIP
        if self.go:
            return Phase.READY
        return Phase.COPY if min(self._reached.values()) >= Phase.PREPARE else Phase.PREPARE
