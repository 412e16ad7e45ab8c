"""Live: a model that serves while ranks come, go and die.

    live = Live.found(address, plan, build)      # or, later and elsewhere: Live.join(address, build)
    while live.serves():
        y = live.run(lambda: model_step(live.model, next_request()))

`run` does a step, and does it again if a member died in it; a step must not change anything before it returns, unless
the model is trained: see Training. All members run their steps together, with tokens or without. Between two steps the
member takes over what arrived in the background, and changes over to the next epoch once all members said, in a step,
that they are ready for it: no message more than the step has anyhow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Self, TypeVar

import torch

from moe.backup import mirror
from moe.comm import Ballot, CoordinatorLostError, Peers, PeersLostError, View
from moe.course import Phase
from moe.epoch import Change, Epoch
from moe.outside import OUTSIDE, Build, ReleasedError, built, elsewhere
from moe.recovery import ExpertsLostError
from moe.salvage import Recovery, Salvage
from moe.staging import Staging, Trimming, in_background, later
from moe.stock import Stock
from moe.terms import Terms
from moe.training import Training
from moe.verdict import verdict
from placement import Plan

T = TypeVar("T")


class Live:
    """member: its number. epoch: None where it does not serve. retries: steps done again. model: what build made."""

    def __init__(self, address: str | os.PathLike[str], build: Build, terms: Terms, plan: Plan | None) -> None:
        self.terms = terms
        self.membership = terms.membership(address, plan)
        try:
            self._begin(build, plan)
        except BaseException:
            self.membership.close()  # else it goes on telling that this member lives
            raise

    def _begin(self, build: Build, plan: Plan | None) -> None:
        terms = self.terms
        epoch = Epoch.read(self.membership.wait(lambda view: view["epoch"] is not None, terms.patience)["epoch"])
        assert epoch.plan is not None
        self.member = self.membership.number
        self.epoch = epoch if plan is not None and self.member in epoch.members else None
        self.steps = self.retries = self.bytes = 0
        self.recoveries: list[Recovery] = []
        self._number = self._handled = 0 if self.epoch is None else epoch.number
        self._staging: Staging | None = None
        self._trimming: Trimming | None = None
        self._old: object = None
        self._fresh = False
        self.peers = OUTSIDE if self.epoch is None else self._met(epoch)
        self.model = built(build, self.peers, elsewhere(epoch.plan) if self.epoch is None else epoch.plan)
        self.stock = Stock(self.model)
        self.optimizer = None if terms.optimizer is None else terms.optimizer(self.model)
        self._training = None if self.optimizer is None else Training(self.model, self.optimizer, terms)
        self._salvage = Salvage(terms.read, self._training)
        if self.epoch is not None:
            self._trim()

    @classmethod
    def found(cls, address: str | os.PathLike[str], plan: Plan, build: Build, terms: Terms = Terms()) -> Self:
        """One of the first members: as many as the plan has ranks, all with the same plan. Returns when all are here.
        build(group, plan): the model, its layers with this group and the plan's placements."""
        return cls(address, build, terms, plan)

    @classmethod
    def join(cls, address: str | os.PathLike[str], build: Build, terms: Terms = Terms()) -> Self:
        """Stand by until wanted. build is given a plan that puts no expert here; weights come from those who serve."""
        return cls(address, build, terms, None)

    def serves(self) -> bool:
        """True when there is a step to run. Who is to come, or about to go, waits here; False once it is released."""
        seen: View | None = None
        while self.epoch is None:
            view = seen = self._news(seen)
            if self.member in view["released"]:
                return False
            try:
                self._heed(view)
                continue
            except PeersLostError as error:  # in training, of those who were to send what it lacks
                error.forget()
            self._recover(self._handled)
        return True

    def run(self, step: Callable[[], T]) -> T:
        """A step, done again where a member died in it. What it raises besides is raised."""
        tries, dead = 0, 0
        while True:
            view = self._view()
            tries, dead = (tries + 1, dead) if len(view["dead"]) == dead else (1, len(view["dead"]))
            try:
                self._heed(view)
                if self.epoch is None and not self.serves():
                    raise ReleasedError(f"member {self.member} was released before its step was done")
                if self._training is not None and self.epoch is not None:
                    self._training.begin(self.epoch, self.steps, self.membership, self.peers)
                result = step()
                self._after()
            except PeersLostError as error:
                if tries >= self.terms.tries:
                    raise
                error.forget()
            else:
                return result
            self.retries += 1
            self._recover(self._number)  # now that the error is gone, which held the group

    def close(self) -> None:
        """Leave, and let go of everything. Of a member that serves this is a failure to the others: drain it first."""
        for task in (self._staging, self._trimming):
            if task is not None:
                task.abandon()
                task.join(2 * self.terms.timeout)
        self._staging = self._trimming = None
        self._let_go()
        self.membership.close()

    def _view(self) -> View:
        self.membership.check()
        assert self.membership.view is not None
        return self.membership.view

    def _news(self, seen: View | None) -> View:
        """Another view than the one seen. Who does not serve may stand by for long."""
        while True:
            with suppress(CoordinatorLostError):
                return self.membership.wait(
                    lambda view: view is not seen,
                    3600.0,
                    lambda: bool(self._staging and self._staging.handover.waiting),
                )

    @torch.inference_mode(False)
    def _heed(self, view: View) -> None:
        """What the coordinator wants, and what came in the background."""
        if self.member in view["report"]:
            coming = 0 if view["change"] is None else view["change"]["new"]["number"]
            self._recover(coming if self.epoch is None else self._number)
            return
        for task in (self._staging, self._trimming):
            if task is not None:
                task.handover.take(self.stock)
        if self._trimming is not None and self._trimming.done:
            if self._trimming.keep is not None:
                self._salvage.drop_all_but(self._trimming.keep)
                self.membership.backed = self._trimming.epoch.number
            self._trimming = None
        fields = view["change"]
        number = 0 if fields is None else fields["new"]["number"]
        if self._staging is not None and self._staging.number != number:
            self._abandon()
            self._trim(anew=False)
        if number > self._handled and self._staging is None and self._trimming is None:
            change = Change.read(fields)
            if self.member in change.union:
                self._handled = number
                self._staging = self._staged(change)
        ready = self._staging is not None and self._staging.ready and view["go"] and self._staging.number == number
        if self.epoch is None and ready and self._staging is not None:
            self._flip(self._staging)
        elif self.peers.ballot is not None:
            self.peers.ballot.ready = number if ready else 0
            self.peers.ballot.agreed = 0

    def _after(self) -> None:
        """A step is done: all members were in one epoch."""
        self.steps += 1
        self.membership.steps = self.steps
        self._salvage.rows = {}  # all who serve hold what they are to: nobody needs what came for a change called off
        if self._fresh:
            self._fresh = False
            self.terms.at(Phase.FREE)
            self._old = None
            self.membership.tell("reached", epoch=self._number, phase=int(Phase.FREE))
            self._trim()
        ballot, staging = self.peers.ballot, self._staging
        if ballot is not None and staging is not None and ballot.agreed == staging.number:
            self._flip(staging)

    @torch.inference_mode(False)
    def _flip(self, staging: Staging) -> None:
        """All members do this after the same step. The old group is kept for a step: others may still be reading."""
        self.terms.at(Phase.FLIP)
        new = staging.change.new
        if self._training is not None and staging.crossing is not None:
            self.steps, sent = self._training.cross(staging.change, self.member, self.steps, staging.crossing)
            self.bytes += sent
        if self.epoch is not None:  # of who comes it proves nothing
            self.membership.tell("reached", epoch=new.number, phase=int(Phase.FLIP))
        self._old, self._staging = (self.peers, staging.crossing), None
        self.bytes += staging.bytes
        self._number = new.number
        if staging.peers is None:
            self.epoch = None
            return
        self._enter(new, staging.peers)

    def _enter(self, epoch: Epoch, peers: Peers) -> None:
        assert epoch.plan is not None
        for layer, placement in zip(self.stock.layers, epoch.plan.placement_L, strict=True):
            layer.resettle(placement, peers)
        self.epoch, self.peers, self._fresh = epoch, peers, True

    def _trim(self, *, anew: bool = True) -> None:
        """Nothing more than the table puts here. anew: the epoch has just begun; it gets backups if they are wanted."""
        if self._training is not None:
            return
        if (epoch := self.epoch) is None:
            self.stock.drop()
            self._salvage.rows = {}
            return
        keeper_of = self.terms.backup(epoch.members, self.membership.host_of) if anew else {}
        extra = any(epoch.experts_of(self.member, layer) != held for layer, held in enumerate(self.stock.held_L))
        if extra or keeper_of:
            kept, meeting, pace = self._salvage.kept, self.terms.meeting(self.membership), self.terms.pace
            then = partial(mirror, epoch, self.member, keeper_of, self.stock, kept, meeting, pace)
            wake = self.membership.wake
            self._trimming = Trimming(epoch, self.member, self.stock, wake, then if keeper_of else lambda: None)

    def _staged(self, change: Change) -> Staging:
        number = change.new.number
        return Staging(
            change,
            self.member,
            self.stock,
            self.model,
            meeting=self.terms.meeting(self.membership),
            pace=self.terms.pace,
            tell=lambda phase: self.membership.tell("reached", epoch=number, phase=int(phase)),
            failed=lambda reason: self.membership.tell("failed", epoch=number, reason=reason),
            notify=self.membership.wake,
            at=self.terms.at,
            carry=in_background if self.optimizer is None else later,
        )

    def _abandon(self) -> None:
        if self._staging is not None:
            self._staging.abandon()
            self._salvage.rows |= self._staging.arrived
            self._staging = None

    @torch.inference_mode(False)
    def _recover(self, number: int) -> None:
        """The epoch of that number broke: report what is here, and go on in a later one as the coordinator says."""
        noticed = time.monotonic()
        deadline = noticed + self.terms.patience
        while True:
            self._let_go()
            self.epoch = None
            view = verdict(self.membership, number, self._salvage.inventory(self.stock), 4 * self.terms.beat, deadline)
            resolved = time.monotonic()
            if view["lost"]:
                raise ExpertsLostError({int(layer): experts for layer, experts in view["lost"].items()})
            epoch = Epoch.read(view["epoch"])
            self._number = self._handled = number = epoch.number
            if self.member not in epoch.members:
                self._salvage.rows = {}
                self.stock.drop()
                return
            try:
                self.peers = self._met(epoch)
                self.steps = self._salvage.restore(self.stock, epoch, self.member, view, self.peers, self.steps)
            except PeersLostError:
                continue
            self._enter(epoch, self.peers)
            self.recoveries.append(Recovery(noticed, resolved, time.monotonic()))
            return

    def _let_go(self) -> None:
        """The last references to the groups: whoever waits for this member hears that it has given up."""
        self._abandon()
        if self._trimming is not None:
            self._trimming.abandon()
            self._trimming = None
        self.peers.give_up()
        self._old, self.peers = None, OUTSIDE
        for layer in self.stock.layers:
            layer.peers = OUTSIDE

    def _met(self, epoch: Epoch) -> Peers:
        rank, number = epoch.rank_of(self.member), epoch.number
        return self.terms.meeting(self.membership).meet(f"epoch-{number}", rank, len(epoch.members), Ballot(number))
