"""Loads: what the experts of a model had to do while it generated, alike on every rank; the layers gather it anyway."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe import MoE
from routing import Assignment, Choice


class Loads:
    """load_LE: rows each expert got since the last `settle`. load_LR: rows each rank computed of them."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        for number, layer in enumerate(self.layers):
            layer.observe(self._listener(number))
        self._clear()

    def settle(self) -> None:
        """Close a step as training would, so that Elastic, or whoever reads what a router closed, hears of it."""
        for layer, load_E in zip(self.layers, self.load_LE, strict=True):
            kept_E = torch.from_numpy(load_E.astype(np.float64))
            layer.router.closed = {"load_E": kept_E, "kept_E": kept_E}
        self._clear()

    @property
    def peak(self) -> float:
        """Rows of the busiest rank over the mean of ranks, the mean over layers. 1 is even."""
        if not self.load_LR.any():
            return 1.0
        return float((self.load_LR.max(axis=1) / self.load_LR.mean(axis=1)).mean())

    def _clear(self) -> None:
        self.load_LE: NDArray[np.int64] = np.zeros(
            (len(self.layers), self.layers[0].config.num_experts), dtype=np.int64
        )
        self.load_LR: NDArray[np.int64] = np.zeros((len(self.layers), self.layers[0].peers.size), dtype=np.int64)

    def _listener(self, number: int) -> Callable[[Choice, Assignment], None]:
        return partial(self._hear, number)

    def _hear(self, number: int, choice: Choice, assignment: Assignment) -> None:
        self.load_LE[number] += assignment.count_RE.sum(axis=0)
        self.load_LR[number] += assignment.load_R
