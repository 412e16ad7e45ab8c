"""Layers as a chain: which rank each expert of each layer sits on, so that tokens stay put from layer to layer.

One copy of each expert. rank_BLE holds several candidate solutions at once. With its neighbours fixed a layer is a
transportation problem, solved exactly; layers of one parity are not neighbours, so half the chain is solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.transport import transport


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """pair_LEE: mass from expert e of a layer to f of the next. near_RR: what a unit of it is worth between two ranks,
    1 on the same rank. room_R: experts a rank can hold in each layer."""

    pair_LEE: FloatArray
    near_RR: FloatArray
    room_R: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.pair_LEE) + 1

    @property
    def num_experts(self) -> int:
        return int(self.pair_LEE.shape[1])

    @property
    def symmetric(self) -> bool:
        """Whether the ranks' names do not matter: all alike, and all equally far from each other."""
        off = self.near_RR[~np.eye(len(self.near_RR), dtype=np.bool_)]
        return len(set(self.room_R)) == 1 and (off.size == 0 or bool((off == off[0]).all()))

    def worth_B(self, rank_BLE: IntArray) -> FloatArray:
        """Mass, each unit times what its hop is worth."""
        total_B = np.zeros(len(rank_BLE))
        for layer, pair_EE in enumerate(self.pair_LEE):
            near_BEE = self.near_RR[rank_BLE[:, layer, :, None], rank_BLE[:, layer + 1, None, :]]
            total_B += (near_BEE * pair_EE).sum(axis=(1, 2))
        return total_B

    def gain(self, rank_BLE: IntArray, layers: IntArray) -> FloatArray:
        """gain_BLER of some layers: what placing an expert on a rank is worth while the neighbouring layers stay."""
        near_BLER = self.near_RR[rank_BLE]
        gain_BLER = np.zeros((len(rank_BLE), len(layers), self.num_experts, len(self.near_RR)))
        before = np.flatnonzero(layers > 0)
        gain_BLER[:, before] += self.pair_LEE[layers[before] - 1].transpose(0, 2, 1) @ near_BLER[:, layers[before] - 1]
        after = np.flatnonzero(layers < self.layers - 1)
        gain_BLER[:, after] += self.pair_LEE[layers[after]] @ near_BLER[:, layers[after] + 1]
        return gain_BLER

    def solved(self, gain_BLER: FloatArray) -> IntArray:
        """The best rank_BLE for given gains, layer by layer."""
        problems = gain_BLER.reshape(-1, *gain_BLER.shape[2:])
        return transport(problems, self.room_R).reshape(gain_BLER.shape[:3])

    def started(self, starts: int, random: np.random.Generator) -> IntArray:
        """The first layer at random, every next one as well as it can follow."""
        seats = np.repeat(np.arange(len(self.room_R)), self.room_R)
        rank_BLE = np.zeros((starts, self.layers, self.num_experts), dtype=np.int64)
        rank_BLE[:, 0] = np.stack([random.permutation(seats)[: self.num_experts] for _ in range(starts)])
        for layer in range(1, self.layers):
            follow_BER = self.pair_LEE[layer - 1].T @ self.near_RR[rank_BLE[:, layer - 1]]
            rank_BLE[:, layer] = transport(follow_BER, self.room_R)
        return rank_BLE

    def swept(self, rank_BLE: IntArray, most_sweeps: int = 30) -> IntArray:
        """Even layers, then odd ones, each as well as possible, until no solution improves."""
        rank_BLE = rank_BLE.copy()
        active, worth_B = np.arange(len(rank_BLE)), self.worth_B(rank_BLE)
        for _ in range(most_sweeps):
            for parity in (0, 1):
                layers = np.arange(parity, self.layers, 2)
                rank_BLE[active[:, None], layers] = self.solved(self.gain(rank_BLE[active], layers))
            after_B = self.worth_B(rank_BLE[active])
            improved = after_B > worth_B[active] * (1 + 1e-9)
            worth_B[active] = after_B
            active = active[improved]
            if not active.size:
                break
        return rank_BLE

    def recombined(self, pool_L: list[IntArray]) -> IntArray:
        """The best chain that takes each layer's grouping from its pool [candidates, E]: dynamic programming.

        Ranks alike in room trade names from layer to layer, by an exact assignment for each pair of candidates. Where
        the chain is symmetric this loses nothing, and pools of all groupings give the optimum.
        """
        worth_P = np.zeros(len(pool_L[0]))
        came_L, name_L = [], []
        for layer, pair_EE in enumerate(self.pair_LEE):
            value_PQ, name_PQR = self._links(pool_L[layer], pool_L[layer + 1], pair_EE)
            total_PQ = worth_P[:, None] + value_PQ
            came_L.append(total_PQ.argmax(axis=0))
            name_L.append(name_PQR)
            worth_P = total_PQ.max(axis=0)
        chosen = [int(worth_P.argmax())]
        for came in reversed(came_L):
            chosen.append(int(came[chosen[-1]]))
        chosen.reverse()
        rank_LE = np.zeros((self.layers, self.num_experts), dtype=np.int64)
        rank_LE[0], named_R = pool_L[0][chosen[0]], np.arange(len(self.room_R))
        for layer in range(1, self.layers):
            follow_R = name_L[layer - 1][chosen[layer - 1], chosen[layer]]
            named_R = named_R[follow_R]
            rank_LE[layer] = named_R[pool_L[layer][chosen[layer]]]
        return rank_LE

    def _links(self, here_PE: IntArray, next_QE: IntArray, pair_EE: FloatArray) -> tuple[FloatArray, IntArray]:
        """(value_PQ, name_PQR): worth of a grouping followed by another, and the rank each group of that then takes."""
        ranks = len(self.room_R)
        one_PER = (here_PE[:, :, None] == np.arange(ranks)).astype(np.float64)
        one_QER = (next_QE[:, :, None] == np.arange(ranks)).astype(np.float64)
        mass_PER = np.einsum("per,ef->pfr", one_PER, pair_EE, optimize=True)
        mass_PQRR = np.einsum("pfr,qfs->pqrs", mass_PER, one_QER, optimize=True)
        # worth_PQ[group of next, rank it takes]
        worth = (mass_PQRR.transpose(0, 1, 3, 2) @ self.near_RR).reshape(-1, ranks, ranks)
        room = np.array(self.room_R)
        worth[:, room[:, None] != room] = -1e9 * (1 + np.abs(worth).max(initial=0.0))
        name = transport(worth, (1,) * ranks)
        value = np.take_along_axis(worth, name[:, :, None], axis=2).sum(axis=(1, 2))
        shape = (len(here_PE), len(next_QE))
        return value.reshape(shape), name.reshape(*shape, ranks)


def pools(rank_BLE: IntArray, most: int) -> list[IntArray]:
    """Each layer's different groupings, whatever the ranks are called, in the order they come."""
    found = []
    for layer in range(rank_BLE.shape[1]):
        different: dict[bytes, IntArray] = {}
        for rank_E in rank_BLE[:, layer]:
            different.setdefault(_canonical(rank_E).tobytes(), rank_E)
        found.append(np.stack(list(different.values())[:most]))
    return found


def _canonical(rank_E: IntArray) -> IntArray:
    """Ranks renamed in the order in which they first appear."""
    _, first, inverse = np.unique(rank_E, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def all_groupings(num_experts: int, ranks: int, most: int) -> IntArray | None:
    """Every way to deal the experts to equal ranks whose names do not matter [ways, E]; None for more than `most`."""
    size, left = divmod(num_experts, ranks)
    ways = 1
    for rank in range(ranks):
        ways *= _choose(num_experts - rank * size - 1, size - 1)
        if left or ways > most:
            return None
    found: list[list[int]] = []
    _deal([-1] * num_experts, 0, ranks, size, found)
    return np.array(found, dtype=np.int64)


def _choose(n: int, k: int) -> int:
    return comb(n, k) if n >= k >= 0 else 0


def _deal(rank_E: list[int], rank: int, ranks: int, size: int, found: list[list[int]]) -> None:
    """The next rank takes the first expert that is free, and any size - 1 others."""
    if rank == ranks:
        found.append(list(rank_E))
        return
    free = [expert for expert, at in enumerate(rank_E) if at < 0]
    for others in combinations(free[1:], size - 1):
        for expert in (free[0], *others):
            rank_E[expert] = rank
        _deal(rank_E, rank + 1, ranks, size, found)
        for expert in (free[0], *others):
            rank_E[expert] = -1
