"""Robust: one plan for several loads, judged by its worst ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.apart import apart
from placement.arrays import FloatArray, IntArray
from placement.bounds import peak_bound_L
from placement.certify import certified
from placement.copies import apportion
from placement.fewer import EMPTY_WORTH, dealt, fewer, keep_better, widened
from placement.joint import hand_over
from placement.packing import ABSENT, held_LRE, pack, placements
from placement.plan import Plan, Provenance
from placement.refine import LEAST, copies_of
from placement.risk import risk
from placement.scenarios import scenarios
from placement.topology import Topology
from placement.trace import LoadTrace

# Weight of the spread over ranks beside the peak: enough to go on where several ranks share the peak.
SPREAD = 0.02
# A layer this near its bound, as a share, is left; a slot changes hands for no smaller a fall, so many times at most.
ENOUGH, WORTH, HAND_OVERS = 1e-3, 2e-3, 30


@dataclass(frozen=True, kw_only=True)
class Robust:
    """Balance every scenario of the trace at once.

    tail: the share of scenarios, worst first, whose peaks are averaged. 0 counts the worst alone, 1 is the mean of all,
    between lies the conditional value at risk.
    most_scenarios: windows of one name are one scenario; more scenarios than this are clustered.
    """

    tail: float = 0.25
    most_scenarios: int = 8
    most_swaps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tail <= 1 or self.most_scenarios < 1:
            raise ValueError(
                f"tail must be between 0 and 1 and most_scenarios at least 1; got {self.tail}, {self.most_scenarios}"
            )

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        load_LKE = self.loads(trace, topology)
        table = apart(self.pack(load_LKE, topology), trace.load_LE, topology)
        bound_LK = np.stack([peak_bound_L(load_LKE[:, k], topology) for k in range(load_LKE.shape[1])], axis=1)
        made: Provenance = {
            "planner": "robust",
            "scenarios": load_LKE.shape[1],
            "tail": self.tail,
            "scenario_peak_over_mean": float(risk(scenario_peaks(table, load_LKE, topology), self.tail).mean()),
            "scenario_bound": float(risk(bound_LK, self.tail).mean()),
            "seed": self.seed,
        }
        return certified(placements(table), trace, topology, made)

    def loads(self, trace: LoadTrace, topology: Topology) -> FloatArray:
        """load_LKE in each scenario, scaled so that a perfect spread takes time 1 on every rank."""
        load_LKE: FloatArray = scenarios(trace, self.most_scenarios, self.seed).transpose(1, 0, 2)
        return load_LKE * sum(topology.speed_R)

    def pack(self, load_LKE: FloatArray, topology: Topology) -> IntArray:
        """Of loads scaled as by `loads`: never worse than RoundRobin's, nor, but for a hair, than with fewer slots."""

        def cost(part_LRS: IntArray, layer_A: IntArray) -> FloatArray:
            return risk(scenario_peaks(part_LRS, load_LKE[layer_A], topology), self.tail)

        table, every = self._packed(load_LKE, topology), np.arange(len(load_LKE))
        keep_better(table, dealt(len(load_LKE), load_LKE.shape[2], topology), every, cost)
        enough_L = self._enough_L(load_LKE, topology)
        for smaller in fewer(topology, load_LKE.shape[2]):
            far = np.flatnonzero(cost(table, every) > enough_L)
            if not far.size:
                break
            keep_better(
                table,
                widened(self._packed(load_LKE[far], smaller), topology),
                far,
                cost,
                EMPTY_WORTH * topology.uniform,
            )
        return table

    def _enough_L(self, load_LKE: FloatArray, topology: Topology) -> FloatArray:
        bound_LK = np.stack([peak_bound_L(load_KE, topology) for load_KE in load_LKE.transpose(1, 0, 2)], axis=1)
        return risk(bound_LK, self.tail) * (1 + ENOUGH)

    def _packed(self, load_LKE: FloatArray, topology: Topology) -> IntArray:
        envelope_LE = risk(load_LKE.transpose(0, 2, 1), self.tail)
        copies_LE = apportion(envelope_LE, topology)
        table = pack(copies_LE, load_LKE, topology, self.tail)
        table = Swaps(table, load_LKE, topology, self.tail).run(self.most_swaps)
        enough_L = self._enough_L(load_LKE, topology)
        active = np.arange(len(table))
        for _ in range(HAND_OVERS):
            active = active[
                risk(scenario_peaks(table[active], load_LKE[active], topology), self.tail) > enough_L[active]
            ]
            handed = [n for n in active.tolist() if hand_over(table[n], load_LKE[n], topology, self.tail, WORTH)]
            active = np.array(handed, dtype=np.int64)
            if not active.size:
                break
            table[active] = Swaps(table[active], load_LKE[active], topology, self.tail).run(50)
        return table


def scenario_peaks(table: IntArray, load_LKE: FloatArray, topology: Topology) -> FloatArray:
    """peak_LK: the time of the busiest rank in each scenario."""
    held = held_LRE(table, load_LKE.shape[2])[:, :, :-1]
    share_LRE = held / held.sum(axis=1, keepdims=True)
    peak_LK: FloatArray = (load_LKE @ share_LRE.transpose(0, 2, 1) / np.array(topology.speed_R)).max(axis=2)
    return peak_LK


class Swaps:
    """Tables under swaps that lower the risk of a layer; changes in place."""

    def __init__(self, expert_LRS: IntArray, load_LKE: FloatArray, topology: Topology, tail: float) -> None:
        self.expert_LRS = expert_LRS.copy()
        self.held_LRE = held_LRE(expert_LRS, load_LKE.shape[2])
        self.each_LKE = np.pad(load_LKE / copies_of(expert_LRS, load_LKE.shape[2])[:, None], ((0, 0), (0, 0), (0, 1)))
        self.speed_R = np.array(topology.speed_R)
        self.tail = tail
        self.load_LKR = np.zeros((*load_LKE.shape[:2], topology.ranks))
        self._recount(np.arange(len(expert_LRS)))

    def run(self, most_swaps: int) -> IntArray:
        """The best swap of the busiest rank of the worst scenario; where none helps, of the next scenario's, and on."""
        layers, scenario_count, _ = self.load_LKR.shape
        looked_at = max(int(np.ceil(self.tail * scenario_count)), 1)
        tried_L = np.zeros(layers, dtype=np.int64)
        for _ in range(most_swaps):
            active = np.flatnonzero(tried_L < looked_at)
            if not active.size:
                break
            time_AKR = self.load_LKR[active] / self.speed_R
            peak_AK = time_AKR.max(axis=2)
            scenario_A = np.argsort(-peak_AK, axis=1, kind="stable")[np.arange(len(active)), tried_L[active]]
            hot_A = time_AKR[np.arange(len(active)), scenario_A].argmax(axis=1)
            value_AN = self._values(active, hot_A)
            best_A = value_AN.argmin(axis=1)
            better = value_AN[np.arange(len(active)), best_A] < risk(peak_AK, self.tail) - LEAST
            tried_L[active] = np.where(better, 0, tried_L[active] + 1)
            self._swap(active[better], hot_A[better], best_A[better])
        return self.expert_LRS

    def _values(self, layer_A: IntArray, hot_A: IntArray) -> FloatArray:
        """value[a, s * N + n]: risk of the layer and its change of spread once the hot rank's slot s trades with n."""
        ranks, slots = self.expert_LRS.shape[1:]
        row = np.arange(len(layer_A))
        mine, theirs = self.expert_LRS[layer_A, hot_A], self.expert_LRS[layer_A].reshape(len(layer_A), -1)
        each_AKE, time_AKR = self.each_LKE[layer_A], self.load_LKR[layer_A] / self.speed_R
        mine_AKS = np.take_along_axis(each_AKE, np.maximum(mine, -1)[:, None] % each_AKE.shape[2], axis=2)
        theirs_AKN = np.take_along_axis(each_AKE, np.maximum(theirs, -1)[:, None] % each_AKE.shape[2], axis=2)
        given = mine_AKS[:, :, :, None] - theirs_AKN[:, :, None]
        hot_before = time_AKR[row, :, hot_A]
        other_before = np.repeat(time_AKR, slots, axis=2)[:, :, None]
        hot_after = hot_before[:, :, None, None] - given / self.speed_R[hot_A][:, None, None, None]
        other_after = other_before + given / np.repeat(self.speed_R, slots)
        spread = hot_after**2 + other_after**2 - other_before**2 - (hot_before**2)[:, :, None, None]
        peak = np.maximum(hot_after, other_after)
        np.maximum(peak, np.repeat(_untouched(time_AKR, hot_A), slots, axis=2)[:, :, None], out=peak)
        value = risk(np.moveaxis(peak, 1, -1), self.tail) + SPREAD / ranks * spread.mean(axis=1)
        mine_held = self.held_LRE[layer_A].transpose(0, 2, 1)[row[:, None], np.maximum(mine, -1)]
        theirs_held = self.held_LRE[layer_A, hot_A][row[:, None], np.maximum(theirs, -1)] | (theirs == ABSENT)
        value[np.repeat(mine_held, slots, axis=2) | theirs_held[:, None] | (mine == ABSENT)[:, :, None]] = np.inf
        value_AN: FloatArray = value.reshape(len(layer_A), -1)
        return value_AN

    def _swap(self, layer_A: IntArray, hot_A: IntArray, best_A: IntArray) -> None:
        ranks, slots = self.expert_LRS.shape[1:]
        slot_A, other_A = best_A // (ranks * slots), best_A % (ranks * slots)
        one, other = (layer_A, hot_A, slot_A), (layer_A, other_A // slots, other_A % slots)
        self.expert_LRS[one], self.expert_LRS[other] = self.expert_LRS[other], self.expert_LRS[one].copy()
        self._recount(layer_A)

    def _recount(self, layer_A: IntArray) -> None:
        experts = self.each_LKE.shape[2] - 1
        held_ARE = held_LRE(self.expert_LRS[layer_A], experts)
        self.held_LRE[layer_A] = held_ARE
        self.load_LKR[layer_A] = self.each_LKE[layer_A] @ held_ARE.transpose(0, 2, 1)


def _untouched(time_AKR: FloatArray, hot_A: IntArray) -> FloatArray:
    """rest[a, k, r]: the peak over the ranks other than the hot one and r."""
    others = time_AKR.copy()
    others[np.arange(len(hot_A)), :, hot_A] = -np.inf
    top = others.argmax(axis=2)[:, :, None]
    first = np.take_along_axis(others, top, axis=2)
    np.put_along_axis(others, top, -np.inf, axis=2)
    second = others.max(axis=2)[:, :, None]
    return np.where(np.arange(time_AKR.shape[2]) == top, second, first)
