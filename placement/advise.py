"""Advice: is a new plan worth its move? Fitted on some windows, judged on others, and free to say "stay"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from placement.arrays import FloatArray
from placement.greedy import Planner, RoundRobin
from placement.metrics import moves_L, peak_over_mean, rank_load_WLR
from placement.plan import Plan
from placement.rename import rename
from placement.robust import Robust
from placement.simulate import ExpertShape, GemmCurve, simulate
from placement.topology import Topology
from placement.trace import LoadTrace

# Gains smaller than this share of a step drown in its noise.
DEAD_ZONE = 0.02


@dataclass(frozen=True, kw_only=True)
class Option:
    """One course: step seconds and peak/mean on held-out windows, and what it takes to get there.

    break_even_tokens: what each rank must process before the gain has paid for the move; infinite where it never does.
    """

    name: str
    seconds: float
    peak_over_mean: float
    moves: int
    move_seconds: float
    gain: float
    break_even_tokens: float
    plan: Plan | None


@dataclass(frozen=True, kw_only=True)
class Advice:
    choice: str
    reason: str
    option_N: tuple[Option, ...]
    fit_windows: int
    held_windows: int
    steps: int

    def without(self, name: str) -> Self:
        """The advice for somebody to whom one of the options is not open."""
        option_N = tuple(option for option in self.option_N if option.name != name)
        choice, reason = _chosen(option_N, self.steps)
        return replace(self, choice=choice, reason=reason, option_N=option_N)

    @property
    def plan(self) -> Plan | None:
        """Where to go; None to stay, or where it is not by moving that the choice would help."""
        chosen = next(option for option in self.option_N if option.name == self.choice)
        return None if self.choice == "stay" else chosen.plan


def advise(
    trace: LoadTrace,
    topology: Topology,
    *,
    running: Plan | None,
    curve: GemmCurve,
    shape: ExpertShape,
    steps: int = 1000,
    planner: Planner = Robust(),
    move_bytes: int = 0,
) -> Advice:
    """Stay, re-place, replicate, or reroute to the least loaded, by what each would save over so many steps.

    running None: experts dealt round. Windows are split into those that fit the plans and those that judge them.
    move_bytes: what goes along when an expert moves, in training its moments too; 0: the weights of its shape.
    """
    if steps < 1:
        raise ValueError(f"a plan must serve for at least 1 step; got {steps}")
    if trace.windows < 2:
        raise ValueError("advice needs a window to fit and another to judge; the trace has 1: record more, or cut it")
    fit, held = trace.split()
    start = RoundRobin()(fit, topology) if running is None else running
    judge = _Judge(start, held, topology, curve, shape, move_bytes or shape.expert_bytes)
    options, even_L = [judge.option("stay", start)], (1,) * trace.layers
    single = Topology.fitting(
        num_experts=trace.num_experts, ranks=topology.ranks, ranks_per_node=topology.ranks_per_node
    )
    if all(need <= slots for need, slots in zip(single.slots_R, topology.slots_R, strict=True)):
        alone = replace(topology, slots_R=single.slots_R)
        options.append(judge.option("re-place", rename(start, planner(fit, alone), even_L)))
    if topology.slots > trace.num_experts:
        options.append(judge.option("replicate", rename(start, planner(fit, topology), even_L)))
    options.append(judge.rerouted())
    choice, reason = _chosen(options, steps)
    return Advice(
        choice=choice,
        reason=reason,
        option_N=tuple(options),
        fit_windows=fit.windows,
        held_windows=held.windows,
        steps=steps,
    )


class _Judge:
    """Scores options on the held-out windows, against the plan that is running."""

    def __init__(
        self, start: Plan, held: LoadTrace, topology: Topology, curve: GemmCurve, shape: ExpertShape, move_bytes: int
    ) -> None:
        self.start, self.held, self.topology, self.curve, self.shape = start, held, topology, curve, shape
        self.move_bytes = move_bytes
        self.now = simulate(start, held, topology, curve, shape)

    def option(self, name: str, plan: Plan) -> Option:
        simulation = simulate(plan, self.held, self.topology, self.curve, self.shape)
        peak = peak_over_mean(rank_load_WLR(plan, self.held.load_WLE), self.topology.speed_R)
        move_seconds = self._move_seconds(plan)
        return self._judged(name, float(simulation.step_W.mean()), float(peak.mean()), plan, move_seconds)

    def rerouted(self) -> Option:
        """Rows above the mean go to ranks below it, step by step; every expert lent pays for its weights on the link.

        A model, not a measurement: an overloaded rank lends its largest experts until its excess is gone.
        """
        load_WLR = rank_load_WLR(self.start, self.held.load_WLE)
        mean_WL = load_WLR.sum(axis=2) / sum(self.topology.speed_R)
        compute_WL = self.curve(mean_WL[:, :, None])[:, :, 0]
        lent_WL = self._lent(load_WLR, mean_WL)
        lend_WL = np.where(lent_WL > 0, self.topology.within_node.latency + lent_WL * self._seconds_an_expert(), 0.0)
        seconds = float((compute_WL + lend_WL + self.now.link_WL).sum(axis=1).mean())
        return self._judged("least-loaded", seconds, 1.0, None, 0.0)

    def _lent(self, load_WLR: FloatArray, mean_WL: FloatArray) -> FloatArray:
        """Experts that the busiest lender of each layer and window must lend."""
        lent_WL = np.zeros(mean_WL.shape)
        speed_R = np.array(self.topology.speed_R)
        for layer, placement in enumerate(self.start.placement_L):
            share_RE = placement.held_RE / placement.copies_E
            for window in range(self.held.windows):
                load_RE = -np.sort(-share_RE * self.held.load_WLE[window, layer], axis=1)
                excess_R = load_WLR[window, layer] - mean_WL[window, layer] * speed_R
                covered_RE = np.cumsum(load_RE, axis=1) < excess_R[:, None] - 1e-9
                lent_WL[window, layer] = (covered_RE.sum(axis=1) + (excess_R > 1e-9)).max()
        return lent_WL

    def _seconds_an_expert(self) -> float:
        return self.shape.expert_bytes / self.topology.within_node.bandwidth

    def _move_seconds(self, plan: Plan) -> float:
        """The rank that fetches most, everything over the slower link: an upper estimate."""
        fetched_R = np.zeros(self.topology.ranks)
        for old, new in zip(self.start.placement_L, plan.placement_L, strict=True):
            fetched_R += (new.held_RE & ~old.held_RE).sum(axis=1)
        slower = min(self.topology.within_node.bandwidth, self.topology.across_nodes.bandwidth)
        return float(fetched_R.max() * self.move_bytes / slower)

    def _judged(self, name: str, seconds: float, peak: float, plan: Plan | None, move_seconds: float) -> Option:
        gain = float(self.now.step_W.mean()) - seconds
        tokens = self.held.load_WLE.sum(axis=2).mean() / self.topology.ranks
        steps = move_seconds / gain if gain > 0 else 0.0 if name == "stay" else math.inf
        moves = 0 if plan is None else int(moves_L(self.start, plan).sum())
        return Option(
            name=name,
            seconds=seconds,
            peak_over_mean=peak,
            moves=moves,
            move_seconds=move_seconds,
            gain=gain,
            break_even_tokens=steps * float(tokens),
            plan=plan,
        )


def _chosen(options: Sequence[Option], steps: int) -> tuple[str, str]:
    stay = options[0]
    best = max(options, key=lambda option: option.gain * steps - option.move_seconds)
    saved = best.gain * steps - best.move_seconds
    if best is stay or saved <= 0:
        return "stay", f"no option pays for its move within {steps} steps on the held-out windows"
    if best.gain < DEAD_ZONE * stay.seconds:
        share = 100 * best.gain / stay.seconds
        return (
            "stay",
            f"the best option, {best.name}, would gain {share:.2g} % of a step; below {DEAD_ZONE:.0%} it is noise",
        )
    return best.name, (
        f"saves {best.gain * 1e6:.4g} us of a {stay.seconds * 1e6:.4g} us step for {best.moves} moves; pays off after "
        f"{best.break_even_tokens:.4g} tokens a rank"
    )
