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
        """The best swap of each problem, again and again; scores are made anew only where a swap has changed them."""
        done_AE, live = rank_AE.copy(), np.arange(len(rank_AE))
        experts, linked = rank_AE.shape[1], bool(self.together_LEE.any())
        rank, gain, layer = rank_AE.copy(), gain_AER, layer_A
        every = np.repeat(np.arange(experts)[None], len(rank), axis=0)
        time = self._times(rank, layer)
        kept, score = self._excess(time) == 0, self._scores(rank, gain, layer, time, every)
        for _ in range(most_swaps):
            best = score.reshape(len(live), -1).argmax(axis=1)
            worthy = score.reshape(len(live), -1)[np.arange(len(live)), best] > -np.inf
            done_AE[live] = rank
            if not worthy.any():
                break
            if not worthy.all():
                live, rank, gain, layer, kept, score = (x[worthy] for x in (live, rank, gain, layer, kept, score))
                every, best = every[worthy], best[worthy]
            a, one, other = np.arange(len(live)), best // experts, best % experts
            rank[a, one], rank[a, other] = rank[a, other], rank[a, one]
            time = self._times(rank, layer)
            # A problem that has come under its cap is judged by gains from now on; fan-out links every expert to every.
            anew = (self._excess(time) == 0) != kept
            kept = kept ^ anew
            touched = (rank == rank[a, one][:, None]) | (rank == rank[a, other][:, None])
            width = experts if linked else int(touched.sum(axis=1).max())
            row = np.argsort(~touched, axis=1, kind="stable")[:, :width]
            part = self._scores(rank, gain, layer, time, row)
            score[a[:, None], row] = part
            score.transpose(0, 2, 1)[a[:, None], row] = part
            if anew.any() and not linked:
                score[anew] = self._scores(rank[anew], gain[anew], layer[anew], time[anew], every[anew])
        done_AE[live] = rank
        return done_AE

    def _times(self, rank_AE: IntArray, layer_A: IntArray) -> FloatArray:
        one_AER = (rank_AE[:, :, None] == np.arange(len(self.speed_R))).astype(np.float64)
        time_AKR: FloatArray = self.load_LKE[layer_A] @ one_AER / np.array(self.speed_R)
        return time_AKR

    def _scores(
        self, rank_AE: IntArray, gain_AER: FloatArray, layer_A: IntArray, time_AKR: FloatArray, row_AM: IntArray
    ) -> FloatArray:
        """score[a, m, f] of swapping expert row_AM[a, m] and f: the gain where the cap is kept; above it, gain per
        excess that goes.

        -inf for a swap that does not help.
        """
        a = np.arange(len(rank_AE))[:, None]
        scale = np.abs(gain_AER).max(axis=(1, 2), initial=0.0)[:, None, None] * 1e-9
        mine_AM = rank_AE[a, row_AM]
        rise = self._rise(rank_AE, gain_AER, layer_A, row_AM)
        load_AKE, speed_R = self.load_LKE[layer_A], np.array(self.speed_R)
        after, before = np.zeros_like(rise), np.zeros_like(rise)
        for scenario in range(load_AKE.shape[1]):
            load, time = load_AKE[:, scenario], time_AKR[:, scenario]
            taken = load[:, None, :] - load[a, row_AM][:, :, None]
            mine, theirs = time[a, mine_AM], time[a, rank_AE]
            after += np.maximum(mine[:, :, None] + taken / speed_R[mine_AM][:, :, None] - self.cap, 0.0)
            after += np.maximum(theirs[:, None, :] - taken / speed_R[rank_AE][:, None, :] - self.cap, 0.0)
            before += np.maximum(mine - self.cap, 0.0)[:, :, None] + np.maximum(theirs - self.cap, 0.0)[:, None, :]
        gains = np.where((after <= 1e-9) & (rise > scale), rise, -np.inf)
        fall = before - after
        # Losing nothing counts a little, so that of free repairs the larger one is taken.
        repairs = np.where(fall > 1e-9, (rise - scale) / np.maximum(fall, 1e-9), -np.inf)
        kept = self._excess(time_AKR) == 0
        score: FloatArray = np.where(kept[:, None, None], gains, repairs)
        score[mine_AM[:, :, None] == rank_AE[:, None, :]] = -np.inf
        return score

    def _rise(self, rank_AE: IntArray, gain_AER: FloatArray, layer_A: IntArray, row_AM: IntArray) -> FloatArray:
        """rise[a, m, f]: what swapping expert row_AM[a, m] and f adds to the worth."""
        a, near_RR = np.arange(len(rank_AE))[:, None], self.chain.near_RR
        together = self.together_LEE[layer_A]
        if together.any():
            gain_AER = gain_AER + together @ near_RR[rank_AE]
        here_AE = np.take_along_axis(gain_AER, rank_AE[:, :, None], axis=2)[:, :, 0]
        mine_AM = rank_AE[a, row_AM]
        there = gain_AER[a[:, :, None], row_AM[:, :, None], rank_AE[:, None, :]]
        back = gain_AER.transpose(0, 2, 1)[a, mine_AM]
        rise: FloatArray = there + back - here_AE[a, row_AM][:, :, None] - here_AE[:, None, :]
        if together.any():
            # Each of the two gains counts the other as if it stayed; after the swap they are as far apart as before.
            rise -= 2 * together[a, row_AM] * (1 - near_RR[mine_AM[:, :, None], rank_AE[:, None, :]])
        return rise


def _by_layer(rank_BLE: IntArray) -> list[tuple[int, IntArray]]:
    return [(layer, rank_BLE[:, layer]) for layer in range(rank_BLE.shape[1])]
