"""Counts and places decided together: hand a copy from one expert to another or to nobody; search over counts by beam.

A slot may be better left empty: on a slow rank, or on one with more slots than others, a copy may be a burden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.copies import apportion, copies_fit
from placement.packing import ABSENT, pack
from placement.plan import EMPTY
from placement.refine import LEAST, rank_time, refine_swaps
from placement.risk import risk
from placement.topology import Topology


def refine_copies(
    expert_LRS: IntArray, load_LE: FloatArray, topology: Topology, enough_L: FloatArray, *, rounds: int = 60
) -> IntArray:
    """Give slots that hold a spare copy, or nothing, to the experts of the busiest rank, with swaps in between."""
    expert_LRS = expert_LRS.copy()
    active = np.arange(len(expert_LRS))
    for _ in range(rounds):
        time_LR = rank_time(expert_LRS[active], load_LE[active], topology)
        active = active[time_LR.max(axis=1) > enough_L[active]]
        handed = [layer for layer in active.tolist() if _hand_over(expert_LRS[layer], load_LE[layer], topology)]
        active = np.array(handed, dtype=np.int64)
        if not active.size:
            break
        expert_LRS[active] = refine_swaps(
            expert_LRS[active], load_LE[active], topology, enough_L[active], most_swaps=50
        )
    return expert_LRS


def _hand_over(expert_RS: IntArray, load_E: FloatArray, topology: Topology) -> bool:
    """The best single hand-over of a slot, in place; False where none helps."""
    return hand_over(expert_RS, load_E[None], topology, 0.0, LEAST)


def hand_over(expert_RS: IntArray, load_KE: FloatArray, topology: Topology, tail: float, least: float) -> bool:
    """The best single hand-over of a slot, in place; False where none lowers the risk by the share `least`."""
    offers = hand_overs(expert_RS, load_KE, topology, tail)
    if not offers.peak_XN.size or offers.peak_XN.min() >= offers.peak * (1 - least):
        return False
    taker, given = divmod(int(offers.peak_XN.argmin()), offers.peak_XN.shape[1])
    expert_RS[offers.rank_N[given], offers.slot_N[given]] = offers.taker_X[taker]
    return True


@dataclass(frozen=True, kw_only=True)
class HandOvers:
    """Slots that hold a spare copy, or nothing, and the layer's peak once x takes slot n: an expert of the busiest rank
    of the worst scenario, or nobody (EMPTY), which leaves the slot free.

    The peak, see `risk`, is infinite where x is on that rank already. peak: as it is now.
    """

    rank_N: IntArray
    slot_N: IntArray
    taker_X: IntArray
    peak_XN: FloatArray
    peak: float


def hand_overs(expert_RS: IntArray, load_KE: FloatArray, topology: Topology, tail: float = 0.0) -> HandOvers:
    ranks, num_experts = len(expert_RS), load_KE.shape[1]
    held_RE = np.zeros((ranks, num_experts + 1))
    rank_N, slot_N = np.nonzero(expert_RS >= 0)
    held_RE[rank_N, expert_RS[rank_N, slot_N]] = 1.0
    copies_E = held_RE[:, :num_experts].sum(axis=0)
    each_KE = load_KE / copies_E
    speed_R = np.array(topology.speed_R)
    load_KR = each_KE @ held_RE[:, :num_experts].T
    rank_N, slot_N = np.nonzero(expert_RS != ABSENT)
    giver_N = expert_RS[rank_N, slot_N]
    spare = (giver_N == EMPTY) | (copies_E[giver_N] >= 2)
    rank_N, slot_N, giver_N = rank_N[spare], slot_N[spare], giver_N[spare]
    # What the giver's other ranks take over, and what this rank is rid of; nothing for a free slot.
    left_KE = np.pad(np.where(copies_E >= 2, load_KE / np.maximum(copies_E - 1, 1), 0.0), ((0, 0), (0, 1)))
    rise_KE = left_KE - np.pad(each_KE, ((0, 0), (0, 1)))
    base_KNR = load_KR[:, None] + held_RE.T[giver_N] * rise_KE[:, giver_N][:, :, None]
    row_N = np.arange(len(rank_N))
    base_KNR[:, row_N, rank_N] -= left_KE[:, giver_N]
    peak_K = (load_KR / speed_R).max(axis=1)
    hot_S = expert_RS[int((load_KR[peak_K.argmax()] / speed_R).argmax())]
    taker_X = np.append(np.unique(hot_S[hot_S >= 0]), EMPTY)
    peak_XN = np.empty((len(taker_X), len(rank_N)))
    for peak_N, taker in zip(peak_XN[:-1], taker_X[:-1].tolist(), strict=True):
        thinner_K = load_KE[:, taker] / (copies_E[taker] + 1)
        after_KNR = base_KNR + (held_RE[:, taker] * (thinner_K - each_KE[:, taker])[:, None])[:, None]
        after_KNR[:, row_N, rank_N] += thinner_K[:, None]
        peak_N[:] = risk((after_KNR / speed_R).max(axis=2).T, tail)
        peak_N[(giver_N == taker) | (held_RE[rank_N, taker] > 0)] = np.inf
    # Engines want full tables: where ranks are alike a spare copy is no burden worth an empty slot.
    peak_XN[-1] = np.where(
        (giver_N == EMPTY) | topology.uniform, np.inf, risk((base_KNR / speed_R).max(axis=2).T, tail)
    )
    return HandOvers(
        rank_N=rank_N, slot_N=slot_N, taker_X=taker_X, peak_XN=peak_XN, peak=float(risk(peak_K[None], tail)[0])
    )


def search(
    load_E: FloatArray,
    topology: Topology,
    enough: float,
    *,
    seed: int,
    rounds: int = 12,
    beam: int = 4,
    tries: int = 8,
    most_counts: int = 256,
) -> IntArray:
    """expert_RS of one layer, by beam search over counts; each count is packed from several slightly shaken orders.

    For small layers: every round packs and refines up to most_counts x tries tables.
    """
    random = np.random.default_rng(seed)
    counts = apportion(load_E[None], topology)
    peak_C, table_CRS = _packed(counts, load_E, topology, tries * 8, random)
    best_peak = float(peak_C[0])
    best_RS: IntArray = table_CRS[0]
    seen = {counts[0].tobytes()}
    for _ in range(rounds):
        if best_peak <= enough:
            break
        neighbours = _neighbours(counts, load_E, topology, seen)
        if not neighbours:
            break
        if len(neighbours) > most_counts:
            neighbours = [neighbours[i] for i in random.permutation(len(neighbours))[:most_counts]]
        candidates = np.stack(neighbours)
        peak_C, table_CRS = _packed(candidates, load_E, topology, tries, random)
        order = np.argsort(peak_C, kind="stable")[:beam]
        if peak_C[order[0]] < best_peak * (1 - LEAST):
            best_peak, best_RS = float(peak_C[order[0]]), table_CRS[order[0]]
        counts = candidates[order]
    return best_RS


def _neighbours(counts: IntArray, load_E: FloatArray, topology: Topology, seen: set[bytes]) -> list[IntArray]:
    """Counts with one copy handed on, not seen before; takers are the experts with the busiest copies."""
    ranks = sum(slots > 0 for slots in topology.slots_R)
    found: list[IntArray] = []
    for copies_E in counts:
        takers = [e for e in np.argsort(-load_E / copies_E, kind="stable").tolist() if copies_E[e] < ranks][:24]
        for giver in np.flatnonzero(copies_E >= 2).tolist():
            for taker in takers:
                handed_E = copies_E.copy()
                handed_E[giver] -= 1
                handed_E[taker] += 1
                if giver != taker and handed_E.tobytes() not in seen and copies_fit(handed_E[None], topology):
                    seen.add(handed_E.tobytes())
                    found.append(handed_E)
    return found


def _packed(
    counts: IntArray, load_E: FloatArray, topology: Topology, tries: int, random: np.random.Generator
) -> tuple[FloatArray, IntArray]:
    """(peak_C, table_CRS): the best of several packings of each vector of counts; the first try is not shaken."""
    shake = 1 + 0.5 * (random.random((len(counts), tries, len(load_E))) - 0.5)
    shake[:, 0] = 1.0
    shaken = (load_E * shake).reshape(-1, len(load_E))
    repeated = np.repeat(counts, tries, axis=0)
    table = pack(repeated, shaken[:, None], topology)
    true_LE = np.repeat(load_E[None], len(table), axis=0)
    table = refine_swaps(table, true_LE, topology, np.zeros(len(table)), most_swaps=60)
    peak = rank_time(table, true_LE, topology).max(axis=1).reshape(len(counts), tries)
    best = peak.argmin(axis=1)
    row = np.arange(len(counts))
    return peak[row, best], table.reshape(len(counts), tries, *table.shape[1:])[row, best]
