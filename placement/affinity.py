"""Affinity: keep tokens on their rank, or at least their node, from layer to layer, with the load under a cap."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from placement import cap
from placement.arrays import FloatArray, IntArray
from placement.capped import Capped
from placement.certify import certified
from placement.chain import Chain, all_groupings, pools
from placement.copies import require_room
from placement.hops import METHOD, local_bound_L
from placement.metrics import local_L, local_share
from placement.packing import placements, table_of, working_table
from placement.plan import Placement, Plan, Provenance
from placement.repair import repaired
from placement.scenarios import scenarios
from placement.topology import Topology
from placement.trace import LoadTrace

# Up to this many groupings of a layer the dynamic programme goes through all of them, and its answer is the optimum.
EXACT = 400
# Layers x experts^2 x ranks up to which the search does all its restarts and rounds; beyond, fewer in proportion.
FULL_SEARCH = 26 * 64**2 * 8


@dataclass(frozen=True, kw_only=True)
class Affinity:
    """ExFlow's objective, jointly with balance: the largest share of hops that stays, no rank above balance_cap.

    balance_cap: the largest peak/mean allowed in each scenario; infinite for none. most_scenarios: see Robust; 1 caps
    the load of all windows together. node_worth: what a hop within a node is worth beside one that stays on its rank.
    fan_out: what it is worth to have all choices of a token in a layer on one rank, beside keeping all its hops local;
    on one node it is worth node_worth of that, so ranks and nodes a token both count. One number serves both, as a hop
    and a dispatch cross the same links.
    Spare slots go to copies, and only where single copies cannot keep the cap in some scenario.
    restarts, rounds: of the search where the optimum cannot be listed; large models get fewer.
    """

    balance_cap: float = math.inf
    most_scenarios: int = 1
    node_worth: float = 0.5
    fan_out: float = 0.0
    restarts: int = 16
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.balance_cap >= 1:
            raise ValueError(f"balance_cap is a peak/mean and must be at least 1; got {self.balance_cap}")
        if self.most_scenarios < 1:
            raise ValueError(f"most_scenarios must be at least 1; got {self.most_scenarios}")
        if not (0 <= self.node_worth <= 1 and self.fan_out >= 0 and self.restarts >= 1 and self.rounds >= 0):
            raise ValueError(
                f"node_worth must be within 0..1, fan_out >= 0, restarts >= 1, rounds >= 0; got {self.node_worth}, "
                f"{self.fan_out}, {self.restarts}, {self.rounds}"
            )

    def __call__(self, trace: LoadTrace, topology: Topology) -> Plan:
        problem = self.problem(trace, topology)
        load_LKE = problem.load_LKE[:, :, : trace.num_experts]
        cap.require_possible(load_LKE, topology, self.balance_cap, trace.layer_L)
        rank_LE = self._exact(problem, topology, trace.num_experts)
        exact = rank_LE is not None
        if rank_LE is None:
            rank_LE = self._searched(problem)
        placement_L = self._with_copies(rank_LE[:, : trace.num_experts], load_LKE, topology)
        made: Provenance = {
            "planner": "affinity",
            "balance_cap": self.balance_cap if math.isfinite(self.balance_cap) else "none",
            "cap": cap.kept(working_table(placement_L, topology), load_LKE, topology, self.balance_cap, trace.layer_L),
            "most_scenarios": self.most_scenarios,
            "node_worth": self.node_worth,
            "fan_out": self.fan_out,
            "hops": "optimal" if exact else "searched",
            "seed": self.seed,
        }
        return with_hops(certified(placement_L, trace, topology, made), trace, topology)

    def problem(self, trace: LoadTrace, topology: Topology) -> Capped:
        """The chain with its loads. Free slots are experts that nobody chooses, so that a swap can also be a move."""
        pair_LEE = trace.follow_LEE
        if pair_LEE is None:
            pair_LEE = np.zeros((0, trace.num_experts, trace.num_experts))
            if trace.layers > 1:
                raise ValueError("the trace has loads alone; affinity needs each token's choices, or pairs of layers")
        require_room(trace.num_experts, topology)
        mass = float(pair_LEE.sum(axis=(1, 2)).mean()) if len(pair_LEE) else 1.0
        together_LEE = np.zeros((trace.layers, trace.num_experts, trace.num_experts))
        if self.fan_out:
            if trace.together_LEE is None:
                raise ValueError("fan_out needs a trace that knows each token's choices")
            total_L = trace.together_LEE.sum(axis=(1, 2), keepdims=True)
            together_LEE = 2 * self.fan_out * mass * trace.together_LEE / np.maximum(total_L, 1.0)
        load_LKE = scenarios(trace, self.most_scenarios, self.seed).transpose(1, 0, 2) * sum(topology.speed_R)
        free = topology.slots - trace.num_experts
        node_R = np.array(topology.node_R)
        near_RR = self.node_worth * (node_R[:, None] == node_R)
        np.fill_diagonal(near_RR, 1.0)
        chain = Chain(
            pair_LEE=np.pad(pair_LEE, ((0, 0), (0, free), (0, free))), near_RR=near_RR, room_R=topology.slots_R
        )
        return Capped(
            chain=chain,
            load_LKE=np.pad(load_LKE, ((0, 0), (0, 0), (0, free))),
            speed_R=topology.speed_R,
            cap=self.balance_cap,
            together_LEE=np.pad(together_LEE, ((0, 0), (0, free), (0, free))),
        )

    def _exact(self, problem: Capped, topology: Topology, num_experts: int) -> IntArray | None:
        """The optimum, where ranks are alike and all groupings that keep the cap can be listed; None elsewhere."""
        chain = problem.chain
        if not chain.symmetric or len(set(topology.speed_R)) > 1 or topology.slots > num_experts or self.fan_out:
            return None
        every = all_groupings(num_experts, topology.ranks, EXACT)
        if every is None:
            return None
        excess_PL = problem.excess_BL(np.repeat(every[:, None], chain.layers, axis=1))
        if (excess_PL.min(axis=0) > 0).any():
            return None
        return chain.recombined([every[excess_PL[:, layer] == 0] for layer in range(chain.layers)])

    def _searched(self, problem: Capped) -> IntArray:
        """Many starts, their best layers recombined, then again from shaken copies of the best."""
        chain, random = problem.chain, np.random.default_rng(self.seed)
        size = chain.layers * chain.num_experts**2 * len(chain.room_R)
        restarts, rounds = (max(round(most * min(FULL_SEARCH / size, 1.0)), 2) for most in (self.restarts, self.rounds))
        solution_BLE = chain.swept(chain.started(restarts, random))
        best_LE: IntArray = solution_BLE[0]
        best_rank = (math.inf, 0.0)
        for _ in range(rounds + 1):
            solution_BLE = self._improved(problem, solution_BLE)
            excess_B = problem.excess_BL(solution_BLE).sum(axis=1)
            kept_BLE = solution_BLE[excess_B == excess_B.min()]
            mixed = self._improved(problem, chain.recombined(pools(kept_BLE, 2 * restarts))[None])
            candidates = np.concatenate([kept_BLE, mixed])
            excess_B, worth_B = problem.excess_BL(candidates).sum(axis=1), problem.worth_B(candidates)
            first = int(np.lexsort((-worth_B, excess_B))[0])
            if (rank := (float(excess_B[first]), -float(worth_B[first]))) < best_rank:
                best_LE, best_rank = candidates[first], rank
            solution_BLE = _shaken(best_LE, restarts, random)
        return best_LE

    def _improved(self, problem: Capped, solution_BLE: IntArray) -> IntArray:
        if self.balance_cap == math.inf and not self.fan_out:
            return problem.chain.swept(solution_BLE)
        return problem.improved(solution_BLE, sweeps=10)

    def _with_copies(self, rank_LE: IntArray, load_LKE: FloatArray, topology: Topology) -> tuple[Placement, ...]:
        table = table_of(rank_LE, topology)
        if topology.slots > rank_LE.shape[1] and self.balance_cap < math.inf:
            table = repaired(table, load_LKE, topology, self.balance_cap, self.seed)
        return placements(table)


def with_hops(plan: Plan, trace: LoadTrace, topology: Topology) -> Plan:
    """The same plan, its certificates and provenance saying how local its hops are and could be at most."""
    pair_LEE = trace.follow_LEE
    if pair_LEE is None or not len(pair_LEE):
        return plan
    stay_L, bound_L = local_L(plan, pair_LEE, range(plan.ranks)), local_bound_L(pair_LEE, topology)
    assert (stay_L <= bound_L + 1e-9).all(), "more hops stay than the bound allows: the bound is wrong"
    certificate_L = [
        replace(certificate, local=float(stay), local_bound=float(max(stay, bound)), method=METHOD)
        for certificate, stay, bound in zip(plan.certificate_L, stay_L, bound_L, strict=False)
    ]
    mass_L = pair_LEE.sum(axis=(1, 2))
    bound = float((np.maximum(bound_L, stay_L) * mass_L).sum() / max(mass_L.sum(), np.finfo(float).tiny))
    provenance = {**plan.provenance, "local": local_share(plan, pair_LEE, range(plan.ranks)), "local_bound": bound}
    certificate_L += plan.certificate_L[len(certificate_L) :]
    return replace(plan, certificate_L=tuple(certificate_L), provenance=provenance)


def _shaken(rank_LE: IntArray, copies: int, random: np.random.Generator) -> IntArray:
    """The solution as it is, and copies with a few experts of a third of the layers passed round."""
    layers, experts = rank_LE.shape
    shaken_BLE = np.repeat(rank_LE[None], copies, axis=0)
    for solution_LE in shaken_BLE[1:]:
        for layer in random.choice(layers, -(-layers // 3), replace=False):
            passed = random.permutation(experts)[:6]
            solution_LE[layer, passed] = solution_LE[layer, np.roll(passed, 1)]
    return shaken_BLE
