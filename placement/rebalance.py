"""Rebalance: follow a changed load from the plan that is running, fetching only so many experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placement.arrays import BoolArray, FloatArray, IntArray
from placement.bounds import peak_bound_L
from placement.certify import certified
from placement.copies import require_room
from placement.greedy import Packed
from placement.joint import hand_overs
from placement.metrics import peak_over_mean_L, require_same_shape
from placement.packing import placements, working_table
from placement.plan import Placement, Plan, Provenance
from placement.refine import Tables, rank_time
from placement.risk import risk
from placement.robust import Robust, scenario_peaks
from placement.topology import Topology
from placement.trace import LoadTrace
from placement.transport import transport


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """From `start`, at most most_moves experts fetched per layer: the best improvements per fetch, or a whole new plan.

    A new plan is relabelled first: its rank contents go to the ranks that hold most of them already, among ranks with
    the same slots and speed. A layer whose peak would fall by less than `worth`, as a share, is left alone; so is one
    that planning anew would not better by so much, judged as it was made: Robust's by its scenarios, others by the load
    of all windows together.
    """

    start: Plan
    most_moves: int
    worth: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most_moves < 0:
            raise ValueError(f"most_moves must be >= 0; got {self.most_moves}")

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        require_same_shape(self.start, trace.layers, trace.num_experts)
        if self.start.ranks != topology.ranks:
            raise ValueError(f"the plan has {self.start.ranks} ranks, the topology {topology.ranks}; plan anew")
        require_room(trace.num_experts, topology)
        replace(self.start, topology=topology)  # refuses a topology that has lost slots which the plan fills
        made: Provenance = {
            "planner": "rebalance",
            "seed": self.seed,
            "start": self.start.fingerprint,
            "most_moves": self.most_moves,
        }
        placement_L = self._followed(trace, topology)
        before = certified(self.start.placement_L, trace, topology, made)
        after = certified(placement_L, trace, topology, made)
        old_L, new_L = (peak_over_mean_L(plan, trace.load_LE, topology) for plan in (before, after))
        kept = new_L > old_L * (1 - self.worth)
        chosen = [old if keep else new for keep, old, new in zip(kept, before.placement_L, placement_L, strict=True)]
        return certified(chosen, trace, topology, made)

    def _followed(self, trace: LoadTrace, topology: Topology) -> list[Placement]:
        load_LE = trace.load_LE
        mean_L = load_LE.sum(axis=1) / sum(topology.speed_R)
        enough_L = peak_bound_L(load_LE, topology) * mean_L * (1 + 1e-3)
        table = working_table(self.start.placement_L, topology)
        packed = Packed(seed=self.seed).pack(load_LE, topology)
        settled_L = self._settled_L(table, packed, trace, topology)
        replanned = placements(packed)
        found: list[Placement] = []
        for layer, start in enumerate(self.start.placement_L):
            if settled_L[layer]:
                found.append(start)
                continue
            anew = relabelled(start, replanned[layer], topology)
            fetched = int((anew.held_RE & ~start.held_RE).sum())
            candidates = [start, anew] if fetched <= self.most_moves else [start]
            improved = stepped(table[layer], load_LE[layer], topology, float(enough_L[layer]), self.most_moves)
            candidates.append(placements(improved[None])[0])
            share = [placement.held_RE / placement.copies_E for placement in candidates]
            peak = [float((s @ load_LE[layer] / np.array(topology.speed_R)).max()) for s in share]
            found.append(candidates[int(np.argmin(peak))])
        return found

    def _settled_L(self, table: IntArray, packed: IntArray, trace: LoadTrace, topology: Topology) -> BoolArray:
        """Layers as good as a plan made anew."""
        if self.start.provenance.get("planner") == "robust":
            made = self.start.provenance
            tail, seed = float(made.get("tail", Robust.tail)), int(made.get("seed", Robust.seed))
            robust = Robust(tail=tail, seed=seed)
            load_LKE = robust.loads(trace, topology)
            old_L, new_L = (
                risk(scenario_peaks(t, load_LKE, topology), tail) for t in (table, robust.pack(load_LKE, topology))
            )
        else:
            old_L, new_L = (rank_time(t, trace.load_LE, topology).max(axis=1) for t in (table, packed))
        settled_L: BoolArray = new_L > old_L * (1 - self.worth)
        return settled_L


def relabelled(start: Placement, target: Placement, topology: Topology) -> Placement:
    """The same rank contents on the ranks that lack fewest of them; only alike ranks trade names."""
    overlap_RR = (target.held_RE.astype(np.int64) @ start.held_RE.T.astype(np.int64)).astype(np.float64)
    kinds = list(zip(topology.slots_R, topology.speed_R, strict=True))
    unlike = np.array([[one != other for other in kinds] for one in kinds])
    overlap_RR[unlike] = -1e6
    goes_R = transport(overlap_RR[None], (1,) * topology.ranks)[0]
    expert_RS = np.empty_like(target.expert_RS)
    expert_RS[goes_R] = target.expert_RS
    return Placement(expert_RS=expert_RS)


def stepped(expert_RS: IntArray, load_E: FloatArray, topology: Topology, enough: float, budget: int) -> IntArray:
    """Swaps and hand-overs, the largest fall of the peak per fetch first, while the fetches stay within the budget.

    expert_RS is a working table of one layer; enough is a peak in seconds at which it stops.
    """
    start = expert_RS[None].copy()
    tables = Tables(start, load_E[None], topology, None)
    started_RE = tables.held_LRE[0].copy()
    best: IntArray = start[0].copy()
    best_peak = float(rank_time(start, load_E[None], topology).max())
    for _ in range(4 * budget):
        current = tables.expert_LRS[0]
        peak = float((tables.load_LR[0] / tables.speed_R).max())
        if peak < best_peak:
            best, best_peak = current.copy(), peak
        if peak <= enough:
            break
        fetched = int((tables.held_LRE[0] & ~started_RE).sum())
        step = _best_step(tables, load_E, topology, started_RE, budget - fetched)
        if step is None:
            break
        tables = Tables(step[None], load_E[None], topology, None)
    return best


def _best_step(
    tables: Tables, load_E: FloatArray, topology: Topology, started_RE: BoolArray, left: int
) -> IntArray | None:
    """The table after the step that lowers the peak most per fetch; None where no step helps within the budget left."""
    expert_RS = tables.expert_LRS[0]
    ranks, slots = expert_RS.shape
    time_R = tables.load_LR[0] / tables.speed_R
    hot, peak = int(time_R.argmax()), float(time_R.max())
    fresh_RE = (~started_RE).astype(np.int64)
    fresh_RE[:, -1] = 0
    at = np.maximum(expert_RS, -1)
    # A swap fetches what was not on its new rank at the start, and takes back what had been fetched to its old one.
    mine_SN = (fresh_RE[:, at[hot]].T - fresh_RE[hot, at[hot]][:, None]).repeat(slots, axis=1)
    theirs_N = fresh_RE[hot, at].ravel() - np.take_along_axis(fresh_RE, at, axis=1).ravel()
    rate, chosen = _best_rate(peak - tables.values(np.array([0]), np.array([hot]))[0], mine_SN + theirs_N, left, peak)
    offers = hand_overs(expert_RS, load_E[None], topology)
    fetch_XN = fresh_RE[offers.rank_N][:, offers.taker_X].T - fresh_RE[offers.rank_N, at[offers.rank_N, offers.slot_N]]
    hand_rate, handed = _best_rate(peak - offers.peak_XN.ravel(), fetch_XN, left, peak)
    if max(rate, hand_rate) <= 0:
        return None
    after: IntArray = expert_RS.copy()
    if hand_rate >= rate:
        taker, given = divmod(handed, len(offers.rank_N))
        after[offers.rank_N[given], offers.slot_N[given]] = offers.taker_X[taker]
    else:
        slot, (rank, other) = chosen // (ranks * slots), divmod(chosen % (ranks * slots), slots)
        after[hot, slot], after[rank, other] = expert_RS[rank, other], expert_RS[hot, slot]
    return after


def _best_rate(fall_N: FloatArray, fetches: IntArray, left: int, peak: float) -> tuple[float, int]:
    """(fall of the peak per fetch, where) of the best candidate that the budget allows; (0, 0) where there is none."""
    fetch_N = fetches.ravel()
    rate_N = np.where((fall_N > 1e-9 * peak) & (fetch_N <= left), fall_N / np.maximum(fetch_N, 0.5), 0.0)
    if not rate_N.size:
        return 0.0, 0
    best = int(rate_N.argmax())
    return float(rate_N[best]), best
