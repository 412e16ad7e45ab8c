"""Coherent: tokens stay with their experts, and the context of every sequence is on every rank."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.coherent import Traffic, follow, gather_context
from moe.comm import Peers, gather_counts
from scripts.model import Bytes
from scripts.serving.batch import Continuous
from scripts.serving.cache import Spots
from scripts.serving.engine import Reading


class Coherent:
    """A path for an Engine. A sequence that reads one byte in a step roams; one that reads more, its prompt, stays
    where its request is. The cache has the slots of all ranks: on each as much memory as otherwise on all together.

    traffic: of the tokens; context: of what the caches tell each
    other; both over all steps so far.
    """

    def __init__(self, model: Bytes, schedule: Continuous, peers: Peers) -> None:
        self.model, self.slots, self.tokens, self.peers = model.eval(), schedule.slots, schedule.tokens, peers
        self.cache = model.cache(self.slots * peers.size)
        # where the last token of each sequence was last
        self.rank_S: NDArray[np.int64] = np.repeat(np.arange(peers.size), self.slots)
        self.traffic = self.context = Traffic(0, 0, 0)

    @torch.no_grad()
    def __call__(self, reading: Reading) -> NDArray[np.int64]:
        everything, owner_T = self._everything(reading)
        pinned_T = np.bincount(everything.slot_T, minlength=len(self.rank_S))[everything.slot_T] > 1
        rank_T = np.where(pinned_T | (everything.place_T == 0), owner_T, self.rank_S[everything.slot_T])
        byte_T, slot_T, place_T = torch.from_numpy(np.stack(everything)).to(self.model.head.weight.device)
        spots, mine = Spots(slot_T, place_T), self._mine(rank_T)
        x_TD = self.model.embed(byte_T[mine], spots.of(mine))
        rank_LT, row_LND = [], []
        for block, past in zip(self.model.layers, self.cache.layers, strict=True):
            here = spots.of(mine)
            x_TD = block.attend(x_TD, past, here)
            rank_LT.append(rank_T)
            row_LND.append(torch.cat([past.key[here], past.value[here]], dim=1))
            x_TD, rank_T, traffic = follow(block.moe, x_TD, rank_T, pinned_T, block.norm_out)
            mine = self._mine(rank_T)
            self.traffic += traffic
        context_LTD, context = gather_context(row_LND, rank_LT, self.peers)
        for past, row_TD in zip(self.cache.layers, context_LTD, strict=True):
            key_TD, value_TD = row_TD.chunk(2, dim=1)
            past.write(key_TD, value_TD, spots)
        self.context += context
        said_T = byte_T.new_zeros(len(byte_T))
        said_T[mine] = self.model.logits(x_TD).argmax(dim=-1)
        told_T: NDArray[np.int64] = gather_counts(said_T, self.peers).sum(axis=0)
        self.rank_S[everything.slot_T] = rank_T
        said: NDArray[np.int64] = told_T[owner_T == self.peers.rank]
        return said

    def _mine(self, rank_T: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.flatnonzero(rank_T == self.peers.rank)).to(self.model.head.weight.device)

    def _everything(self, reading: Reading) -> tuple[Reading, NDArray[np.int64]]:
        """All ranks' tokens, by rank, in slots of the whole; and whose they are."""
        told = torch.full((3, self.tokens), -1)
        told[:, : len(reading.byte_T)] = torch.from_numpy(np.stack(reading))
        table = gather_counts(told.reshape(-1), self.peers).reshape(self.peers.size, 3, self.tokens).transpose(1, 0, 2)
        owner_T, _ = real = np.nonzero(table[0] >= 0)
        byte_T, slot_T, place_T = (part[real] for part in table)
        return Reading(byte_T, slot_T + owner_T * self.slots, place_T), owner_T
