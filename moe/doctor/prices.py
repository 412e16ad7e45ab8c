"""When prices move: once per optimiser step, and neither in a forward nor in its recomputation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.doctor.block import Block
from moe.doctor.examiner import Case, Examiner, Heard
from moe.doctor.symptom import Symptom

FEW_STEPS = 3
UNEVEN = 0.1


@dataclass
class _Clock:
    """What was seen of one block's prices. moved, moved_again: in forwards, in recomputations. alive: steps in which
    they moved at all."""

    low: str | None = None
    moved: int = 0
    moved_again: int = 0
    alive: int = 0
    settled: int | None = None
    known: bool = False
    moves: bool = False
    counted: bool = False
    max_vio: float = 0.0


class PriceClock(Examiner):
    """Prices that move too often, or never, or lie in 16 bits."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.clocks = {block.name: _Clock(moves=block.moves) for block in case.blocks}
        self.blocks = {block.name: block for block in case.blocks}
        self.last: dict[str, Tensor] = {}
        self.opening: dict[str, Tensor] = {}
        self.settled: dict[str, int] = {}
        self.load = {block.name: torch.zeros(block.num_experts) for block in case.blocks}

    def opens(self) -> None:
        for name, block in self.blocks.items():
            price_E, clock = block.price(), self.clocks[name]
            settled = block.settled()
            if settled is not None:
                clock.settled = settled - self.settled.setdefault(name, settled)
            if price_E is None:
                continue
            clock.known = True
            now_E = price_E.detach().clone()
            if price_E.dtype in (torch.bfloat16, torch.float16) and bool(now_E.any()):
                clock.low = str(price_E.dtype).removeprefix("torch.")
            if name in self.opening and not torch.equal(self.opening[name], now_E):
                clock.alive += 1
            self.opening[name] = self.last[name] = now_E

    def enters(self, block: Block, again: bool) -> None:
        if not block.module.training:
            return
        self._look(block, None)
        if (counts_E := block.counts()) is not None:
            self.clocks[block.name].counted |= bool(counts_E.any())

    def leaves(self, block: Block, again: bool) -> None:
        if block.module.training:
            self._look(block, again)

    def hears(self, heard: Heard) -> None:
        if not heard.again and heard.said.chosen_TE is not None:
            self.load[heard.block.name] += heard.said.chosen_TE.sum(dim=0).float().cpu()

    def _look(self, block: Block, again: bool | None) -> None:
        """Have they moved since they were looked at last? Only after a step they ought to."""
        price_E, last_E = block.price(), self.last.get(block.name)
        if price_E is None or last_E is None or torch.equal(price_E, last_E):
            return
        self.last[block.name] = price_E.detach().clone()
        if again:
            self.clocks[block.name].moved_again += 1
        else:
            self.clocks[block.name].moved += 1

    def evidence(self) -> Any:
        for name, clock in self.clocks.items():
            mean = float(self.load[name].mean())
            clock.max_vio = float(self.load[name].max()) / mean - 1 if mean else 0.0
        return self.clocks

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in evidence_R[0]:
            seen = [evidence[name] for evidence in evidence_R]
            worst = max(seen, key=lambda clock: clock.moved_again + clock.moved)
            yield from _too_often(name, worst, steps)
            if any(clock.low for clock in seen):
                yield _in_16_bits(name, next(clock.low for clock in seen if clock.low))
            yield from _never(name, seen, steps)


def _too_often(name: str, clock: _Clock, steps: int) -> Iterator[Symptom]:
    remedy = (
        "count loads in the forward, and update once per optimiser step, from the sum of all micro-batches and ranks"
    )
    if clock.moved_again:
        yield Symptom(
            name="price-in-recompute",
            module=name,
            evidence=f"the prices moved in {clock.moved} forwards and again in {clock.moved_again} recomputations, "
            f"over {steps} steps",
            remedy=f"{remedy}; a guard on training or on grad mode does not tell a recomputation",
        )
    elif steps and clock.moved:
        yield Symptom(
            name="price-per-forward",
            module=name,
            evidence=f"the prices moved {clock.moved} times between the first and the last forward of a step, in "
            f"{steps} steps",
            remedy=remedy,
        )
    elif steps and clock.settled is not None and clock.settled > steps:
        yield Symptom(
            name="price-per-forward",
            module=name,
            evidence=f"the prices were settled {clock.settled} times in {steps} optimiser steps",
            remedy="call settle_prices once per optimiser step: not for each micro-batch, nor beside settle_after",
        )


def _in_16_bits(name: str, kind: str) -> Symptom:
    return Symptom(
        name="price-precision",
        module=name,
        evidence=f"the prices are {kind}: in bf16 steps of 1e-3 are lost from 0.5 on",
        remedy="keep them in fp32 when the model is converted; what was rounded already must be loaded again",
    )


def _never(name: str, seen: Sequence[_Clock], steps: int) -> Iterator[Symptom]:
    """A balancer that nobody settles; or one that is settled, sees uneven loads and still does not move."""
    uneven = max(clock.max_vio for clock in seen)
    first = seen[0]
    ours = first.settled is not None and first.moves
    theirs = first.settled is None and first.known and (first.moves or any(clock.counted for clock in seen))
    if ours and steps >= 2 and first.settled == 0:
        yield Symptom(
            name="price-never-settled",
            module=name,
            evidence=f"the layer has a balancer, but its prices were not settled once in {steps} optimiser steps",
            remedy="call settle_prices(model) after optimizer.step(), or settle_after(optimizer, model) once",
        )
    elif ours or theirs:
        still = not any(clock.alive or clock.moved or clock.moved_again for clock in seen)
        if still and steps >= FEW_STEPS and uneven > UNEVEN and np.isfinite(uneven):
            yield Symptom(
                name="balancer-dead",
                module=name,
                evidence=f"the loads are uneven (MaxVio {uneven:.2f}), yet the prices never moved in {steps} steps",
                remedy="see that the update runs for this layer, on these tensors, with a step that is not 0, and that "
                "nothing puts the old prices back",
            )
