"""Salvage: what a survivor can bring into the epoch that follows a death, besides its stack: experts that had arrived
for a change that was called off, and a checkpoint to read from."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from torch import Tensor

from moe.comm import Peers, View
from moe.epoch import Epoch
from moe.recovery import BACKUP, CHECKPOINT, Inventory, Restore
from moe.stock import Stock
from moe.terms import Reader
from moe.training import Training

Rows = dict[tuple[int, int], Tensor]


class Recovery(NamedTuple):
    """When a member noticed that others were gone, heard how to go on, and was in the new epoch; of a clock that only
    runs forward."""

    noticed: float
    resolved: float
    ready: float


class Salvage:
    """rows: experts that arrived. kept: backups of others' experts. read: (layer's name, expert) -> its tensors by
    name, from a checkpoint; None where there is none. training: which has ways of its own, as weights change."""

    def __init__(self, read: Reader | None, training: Training | None) -> None:
        self.rows: Rows = {}
        self.kept: Rows = {}
        self._read, self._training = read, training

    def inventory(self, stock: Stock) -> Inventory:
        if self._training is not None:
            return self._training.inventory(stock)
        kept = list(self.kept)  # a thread may be adding to it
        held_L = [set(ids) for ids in stock.held_L]
        for layer, expert in self.rows:
            held_L[layer].add(expert)
        return Inventory(
            held_L=tuple(tuple(sorted(held)) for held in held_L),
            backup_L=tuple(tuple(e for n, e in sorted(kept) if n == layer) for layer in range(len(held_L))),
            reads=self._read is not None,
        )

    def drop_all_but(self, keep: Set[tuple[int, int]]) -> None:
        """Backups that are kept elsewhere by now."""
        self.kept = {cell: row_B for cell, row_B in list(self.kept.items()) if cell in keep}

    def restore(self, stock: Stock, epoch: Epoch, member: int, view: View, peers: Peers, step: int) -> int:
        """Into the stack whatever the epoch puts here and is not in it. After that the rest is let go. -> the step to
        go on from, in training perhaps an earlier one"""
        if self._training is not None:
            return self._training.go_back(view, epoch, member, peers)
        restores = [Restore(**fields) for fields in view["restores"]]
        source_of = {(r.layer, r.expert): r.source for r in restores if r.member == member}
        for layer, held in enumerate(stock.held_L):
            missing = [expert for expert in epoch.experts_of(member, layer) if expert not in held]
            rows = {expert: self._row(stock, layer, expert, source_of.get((layer, expert), "")) for expert in missing}
            if rows:
                ids = (*held, *missing)
                stock.take(layer, ids, stock.restack(layer, ids, rows))
        self.rows = {}
        return step

    def _row(self, stock: Stock, layer: int, expert: int, source: str) -> Tensor:
        if source == BACKUP:
            return self.kept[layer, expert]
        if source == CHECKPOINT:
            assert self._read is not None
            return stock.rows_of(layer, self._read(stock.names[layer], expert))
        return self.rows[layer, expert]
