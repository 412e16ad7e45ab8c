"""Elastic: the loop from what the experts had to do to where they live, closed while a model trains.

    elastic = Elastic(model, optimizer, topology, plan_every=500, planner=Robust(), advise=partial(advise, ...))
    for batch in batches:
        ...
        optimizer.step()
        optimizer.zero_grad()
        settle_prices(model)
        elastic.step()

Loads come from the settled statistics, which are the same on every rank; planning is deterministic; so all ranks reach
one decision without a message, and move_experts checks that they did. It moves experts between the ranks that are
there. Ranks that join, leave or fail are the business of Live.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.belongings import Belongings, layers_of
from moe.comm import EVERYONE, Everyone, Group
from moe.moving import Moved, move_experts, plan_of
from placement import Advice, LoadTrace, Plan, Planner, Topology

REROUTE = "least-loaded"


class Advise(Protocol):
    """placement.advise with the shape and the curve of the experts filled in, as by functools.partial."""

    def __call__(
        self, trace: LoadTrace, topology: Topology, *, running: Plan, planner: Planner, move_bytes: int
    ) -> Advice: ...


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How the loop is: for alarms on one that died in silence. Steps and seconds are ages; infinite for never.

    reason: of the last decision, in words. left: moves of a migration under way.
    """

    step: int
    steps_since_plan: float
    steps_since_commit: float
    seconds_since_step: float
    seconds_since_commit: float
    left: int
    reason: str

    def readings(self) -> dict[str, dict[str, float]]:
        """For a sink, beside what Meters read."""
        return {"elastic": {name: float(value) for name, value in vars(self).items() if name not in ("step", "reason")}}


class Elastic:
    """Plans every so many steps from the last windows, asks the advisor, and moves experts only if the gain on windows
    that the plan has not seen pays for the move.

    topology: the slots of the group's ranks, and its links. window: steps whose loads count as one; windows: how many
    are remembered. patience: plannings in a row that must advise a move before one is made, so that a passing load
    moves nothing. rest: steps after a migration in which none is planned. most_bytes: see move_experts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        topology: Topology,
        *,
        plan_every: int,
        planner: Planner,
        advise: Advise,
        window: int = 10,
        windows: int = 16,
        patience: int = 2,
        rest: int = 0,
        most_bytes: float = math.inf,
        group: Group | Everyone = EVERYONE,
    ) -> None:
        if min(plan_every, window, patience) < 1 or windows < 2 or rest < 0:
            raise ValueError(
                f"plan_every, window and patience must be >= 1, windows >= 2, rest >= 0; got {plan_every}, {window}, "
                f"{patience}, {windows}, {rest}"
            )
        self.model, self.optimizer, self.topology, self.group = model, optimizer, topology, group
        self.plan_every, self.planner, self.advise = plan_every, planner, advise
        self.window, self.patience, self.rest, self.most_bytes = window, patience, rest, most_bytes
        self.layers = layers_of(model)
        if len(sizes := {layer.config.num_experts for layer in self.layers.values()}) > 1:
            raise ValueError(f"layers of {sorted(sizes)} experts have no common plan; use an Elastic for each kind")
        self.steps = 0
        self.target: Plan | None = None
        self._load_LE: Tensor | None = None
        self._window_W: deque[NDArray[np.float64]] = deque(maxlen=windows)
        self._wanted, self._left, self._reason = 0, 0, "nothing was planned yet"
        self._planned, self._committed = -math.inf, -math.inf
        self._beat, self._commit_time = time.monotonic(), -math.inf

    def step(self) -> Moved | None:
        """After the prices of a step were settled, without gradients; on every rank. -> what moved, None for nothing"""
        if not all(layer.router.closed for layer in self.layers.values()):
            raise ValueError("no step was settled yet; call settle_prices(model) before elastic.step()")
        self.steps += 1
        self._beat = time.monotonic()
        self._hear()
        if self.target is None and self.steps % self.plan_every == 0 and self.steps - self._committed > self.rest:
            self._plan()
        return None if self.target is None else self._move(self.target)

    @property
    def pulse(self) -> Pulse:
        now = time.monotonic()
        return Pulse(
            step=self.steps,
            steps_since_plan=self.steps - self._planned,
            steps_since_commit=self.steps - self._committed,
            seconds_since_step=now - self._beat,
            seconds_since_commit=now - self._commit_time,
            left=self._left,
            reason=self._reason,
        )

    def _hear(self) -> None:
        """Add up the loads where they are; they come to the host once a window."""
        load_LE = torch.stack([layer.router.closed["kept_E"] for layer in self.layers.values()])
        self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE
        if self.steps % self.window == 0:
            heard = self._load_LE.cpu().numpy()
            if heard.sum(axis=1).all():
                self._window_W.append(heard)
            self._load_LE = None

    def _plan(self) -> None:
        if len(self._window_W) < 2:
            self._reason = f"{len(self._window_W)} windows heard; a plan needs one to fit and another to judge"
            return
        self._planned = self.steps
        trace = LoadTrace(load_WLE=np.stack(self._window_W))
        advice = self.advise(
            trace, self.topology, running=plan_of(self.model), planner=self.planner, move_bytes=self._expert_bytes()
        ).without(REROUTE)
        self._reason = f"{advice.choice}: {advice.reason}"
        self._wanted = 0 if advice.plan is None else self._wanted + 1
        if self._wanted >= self.patience:
            self.target, self._wanted = advice.plan, 0

    def _move(self, target: Plan) -> Moved:
        moved = move_experts(self.model, target, self.optimizer, most_bytes=self.most_bytes, group=self.group)
        self._left = moved.left
        self._committed, self._commit_time = self.steps, time.monotonic()
        if moved.done:
            self.target = None
        return moved

    def _expert_bytes(self) -> int:
        return max(Belongings.of(layer, self.optimizer).expert_bytes for layer in self.layers.values())
