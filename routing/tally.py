"""Tally: how even the loads of a run are, over its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from routing.metrics import max_vio


@dataclass(frozen=True, kw_only=True, eq=False)
class Tally:
    """Steps added up: AvgMaxVio and SupMaxVio, the mean and the largest MaxVio of a step, and the global MaxVio.

    `tally = tally.add(load_LE)` once a step, without a wait for the device. AvgMaxVio and SupMaxVio are given for each
    layer (avg_L, sup_L) and for the model, whose MaxVio in a step is the mean of its layers' (avg, sup). The global one
    is of the loads of all steps together: high in a batch and low over the run, experts have specialised; high in both,
    they have collapsed.

    steps: how many were added. load_LE: rows of all steps. total_L: MaxVio of each step, added up. sup_L, sup: largest.
    """

    steps: int
    load_LE: Tensor
    total_L: Tensor
    sup_L: Tensor
    sup: Tensor

    @classmethod
    def empty(cls, layers: int, num_experts: int, device: torch.device | str = "cpu") -> Self:
        if layers < 1 or num_experts < 1:
            raise ValueError(f"a tally needs at least one layer and one expert; got {layers} and {num_experts}")
        # fp64 holds whole rows up to 2^53, and loads need not be whole.
        return cls(
            steps=0,
            load_LE=torch.zeros(layers, num_experts, dtype=torch.float64, device=device),
            total_L=torch.zeros(layers, dtype=torch.float64, device=device),
            sup_L=torch.zeros(layers, dtype=torch.float64, device=device),
            sup=torch.zeros((), dtype=torch.float64, device=device),
        )

    @torch.no_grad()
    def add(self, load_LE: Tensor) -> Self:
        """One more step: rows of the whole group, every micro-batch of the step."""
        if load_LE.shape != self.load_LE.shape:
            raise ValueError(
                f"this tally is of loads [{self.load_LE.shape[0]} layers, {self.load_LE.shape[1]} experts]; "
                f"got shape {tuple(load_LE.shape)}"
            )
        step_LE = load_LE.to(self.load_LE)
        vio_L = max_vio(step_LE)
        return type(self)(
            steps=self.steps + 1,
            load_LE=self.load_LE + step_LE,
            total_L=self.total_L + vio_L,
            sup_L=torch.maximum(self.sup_L, vio_L),
            sup=torch.maximum(self.sup, vio_L.mean()),
        )

    @property
    def avg_L(self) -> Tensor:
        """AvgMaxVio of each layer."""
        if not self.steps:
            raise ValueError("no step was added to this tally yet; its mean is not known")
        return self.total_L / self.steps

    @property
    def avg(self) -> Tensor:
        """AvgMaxVio of the model."""
        return self.avg_L.mean()

    @property
    def global_L(self) -> Tensor:
        """MaxVio of the loads of all steps together, of each layer."""
        return max_vio(self.load_LE)
