"""A chain of layers under a cap on every rank's load in every scenario: swaps keep tokens local and loads even."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import FloatArray, IntArray
from placement.chain import Chain


@dataclass(frozen=True, kw_only=True, eq=False)
class Capped:
    """load_LKE: loads in each scenario, scaled so that a perfect spread takes time 1 on every rank. cap: no rank may
    take longer. together_LEE: worth of two experts of a layer on one rank (fan-out), beside the chain's own worth.

    Two experts that a token chooses together are as near as two that it visits one after the other: on one node they
    are worth the chain's near_RR of `together`, for a token that reaches two ranks of a node crosses to it once. With
    two choices a token this counts exactly the ranks and nodes it is spared; with more it counts pairs, of which k
    choices in one place are k (k - 1) / 2.
    """

    chain: Chain
    load_LKE: FloatArray
    speed_R: tuple[float, ...]
    cap: float
    together_LEE: FloatArray

    def worth_B(self, rank_BLE: IntArray) -> FloatArray:
        together_B = np.zeros(len(rank_BLE))
        for layer, together_EE in enumerate(self.together_LEE):
            near_BEE = self.chain.near_RR[rank_BLE[:, layer, :, None], rank_BLE[:, layer, None, :]]
            together_B += (near_BEE * together_EE).sum(axis=(1, 2)) / 2
        return self.chain.worth_B(rank_BLE) + together_B

    def excess_BL(self, rank_BLE: IntArray) -> FloatArray:
        """Time above the cap, summed over ranks and scenarios; 0 for a layer that keeps it."""
        excess = [self._excess(self._time(rank_BE, self.load_LKE[layer])) for layer, rank_BE in _by_layer(rank_BLE)]
        return np.stack(excess, axis=1)

    def _time(self, rank_BE: IntArray, load_KE: FloatArray) -> FloatArray:
        one_BER = (rank_BE[:, :, None] == np.arange(len(self.speed_R))).astype(np.float64)
        time_BKR: FloatArray = load_KE @ one_BER / np.array(self.speed_R)
        return time_BKR

    def _excess(self, time_BKR: FloatArray) -> FloatArray:
        excess_B: FloatArray = np.maximum(time_BKR - self.cap, 0.0).sum(axis=(1, 2))
        return np.where(excess_B > 1e-9, excess_B, 0.0)

    def improved(self, rank_BLE: IntArray, sweeps: int, most_swaps: int = 200) -> IntArray:
        """Swaps within a layer, even and odd layers in turn: first to keep the cap at the least loss, then to gain."""
        rank_BLE = rank_BLE.copy()
        layers = rank_BLE.shape[1]
        for _ in range(sweeps):
            before = rank_BLE.copy()
            for layer_P in (np.arange(0, layers, 2), np.arange(1, layers, 2)):
                if not layer_P.size:
                    continue
                gain = self.chain.gain(rank_BLE, layer_P).reshape(-1, *rank_BLE.shape[2:], len(self.speed_R))
                layer_A = np.tile(layer_P, len(rank_BLE))
                rank_AE = rank_BLE[:, layer_P].reshape(-1, rank_BLE.shape[2])
                swapped = self._swapped(rank_AE, gain, layer_A, most_swaps)
                rank_BLE[:, layer_P] = swapped.reshape(len(rank_BLE), len(layer_P), -1)
            if (before == rank_BLE).all():
                break
        return rank_BLE

    def _swapped(self, rank_AE: IntArray, gain_AER: FloatArray, layer_A: IntArray, most_swaps: int) -> IntArray:
        rank_AE = rank_AE.copy()
        active = np.arange(len(rank_AE))
        for _ in range(most_swaps):
            rank, layer = rank_AE[active], layer_A[active]
            time = np.stack([self._time(r[None], self.load_LKE[n])[0] for r, n in zip(rank, layer, strict=True)])
            score = self._scores(rank, gain_AER[active], layer, time)
            best = score.reshape(len(active), -1).argmax(axis=1)
            worthy = score.reshape(len(active), -1)[np.arange(len(active)), best] > -np.inf
            active, best = active[worthy], best[worthy]
            if not active.size:
                break
            one, other = best // rank_AE.shape[1], best % rank_AE.shape[1]
            rank_AE[active, one], rank_AE[active, other] = rank_AE[active, other], rank_AE[active, one]
        return rank_AE

    def _scores(self, rank_AE: IntArray, gain_AER: FloatArray, layer_A: IntArray, time_AKR: FloatArray) -> FloatArray:
        """score[a, e, f] of swapping e and f: the gain where the cap is kept; above it, gain per excess that goes.

        -inf for a swap that does not help.
        """
        experts = rank_AE.shape[1]
        together, near_RR = self.together_LEE[layer_A], self.chain.near_RR
        apart = together
        if together.any():
            gain_AER = gain_AER + together @ near_RR[rank_AE]
            # Each of the two gains counts the other as if it stayed; after the swap they are as far apart as before.
            apart = together * (1 - near_RR[rank_AE[:, :, None], rank_AE[:, None, :]])
        a = np.arange(len(rank_AE))[:, None, None]
        there_AEE = gain_AER[a, np.arange(experts)[None, :, None], rank_AE[:, None, :]]
        here_AE = np.take_along_axis(gain_AER, rank_AE[:, :, None], axis=2)[:, :, 0]
        rise = there_AEE + there_AEE.transpose(0, 2, 1) - here_AE[:, :, None] - here_AE[:, None, :] - 2 * apart
        load_AKE, speed_R = self.load_LKE[layer_A], np.array(self.speed_R)
        speed_AE = speed_R[rank_AE]
        time_AKE = np.take_along_axis(time_AKR, np.repeat(rank_AE[:, None], time_AKR.shape[1], axis=1), axis=2)
        after, before = np.zeros_like(rise), np.zeros_like(rise)
        for scenario in range(load_AKE.shape[1]):
            load, time = load_AKE[:, scenario], time_AKE[:, scenario]
            taken = (load[:, None, :] - load[:, :, None]) / speed_AE[:, :, None]
            over = np.maximum(time[:, :, None] + taken - self.cap, 0.0)
            after += over + over.transpose(0, 2, 1)
            base = np.maximum(time - self.cap, 0.0)
            before += base[:, :, None] + base[:, None, :]
        scale = np.abs(gain_AER).max() * 1e-9
        same = rank_AE[:, :, None] == rank_AE[:, None, :]
        gains = np.where((after <= 1e-9) & (rise > scale), rise, -np.inf)
        fall = before - after
        # Losing nothing counts a little, so that of free repairs the larger one is taken.
        repairs = np.where(fall > 1e-9, (rise - scale) / np.maximum(fall, 1e-9), -np.inf)
        kept = self._excess(time_AKR) == 0
        score: FloatArray = np.where(kept[:, None, None], gains, repairs)
        score[same] = -np.inf
        return score


def _by_layer(rank_BLE: IntArray) -> list[tuple[int, IntArray]]:
    return [(layer, rank_BLE[:, layer]) for layer in range(rank_BLE.shape[1])]
