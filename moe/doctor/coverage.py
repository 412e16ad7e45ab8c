"""MoE blocks that the balancer, the parallelisation or the optimiser passes over; and a live loop that has died."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moe.comm import EVERYONE, Peers
from moe.doctor.examiner import Case, Examiner
from moe.doctor.symptom import Symptom
from moe.elastic import Elastic

SILENT = 3


class _Cover(NamedTuple):
    """settled: how often each block's prices were, in the steps seen. spread: are its experts on several ranks? stale:
    blocks whose experts have gradients and are in no optimiser, though an optimiser holds tensors of no module."""

    settled: dict[str, int]
    spread: dict[str, bool]
    ranks: int
    stale: tuple[str, ...]


class Coverage(Examiner):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.start: dict[str, int] = {}
        self.settled: dict[str, int] = {}
        self.held: set[int] = set()
        self.wanting: set[str] = set()

    def opens(self) -> None:
        for block in self.case.blocks:
            if block.moves and (settled := block.settled()) is not None:
                self.settled[block.name] = settled - self.start.setdefault(block.name, settled)

    def steps(self, held: Sequence[Tensor]) -> None:
        self.held |= {id(p) for p in held}
        for block in self.case.blocks:
            if any(weight.parameter.grad is not None for weight in block.down()):
                self.wanting.add(block.name)

    def evidence(self) -> Any:
        stale = []
        strangers = self.held - {id(p) for p in self.case.model.parameters()}
        for block in self.case.blocks if strangers else ():
            weights = [weight.parameter for weight in block.down() if weight.parameter.requires_grad]
            if block.name in self.wanting and weights and not any(id(weight) in self.held for weight in weights):
                stale.append(block.name)
        spread = {block.name: block.spread for block in self.case.blocks}
        return _Cover(self.settled, spread, Peers.of(EVERYONE).size, tuple(stale))

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        first: _Cover = evidence_R[0]
        most = max(first.settled.values(), default=0)
        for name, settled in first.settled.items():
            if settled < most:
                yield Symptom(
                    name="uncovered",
                    module=name,
                    evidence=f"its prices were settled {settled} times in {steps} steps, those of others {most} times",
                    remedy="settle the whole model: settle_prices(model), not a part of it",
                )
        spread = [name for name, is_spread in first.spread.items() if is_spread]
        for name, is_spread in first.spread.items():
            if spread and not is_spread:
                yield Symptom(
                    name="uncovered",
                    module=name,
                    evidence=f"its experts are whole on each of {first.ranks} ranks, those of {spread[0]} are spread",
                    remedy="parallelise the whole model, or give this layer the group too",
                )
        for name in sorted({name for cover in evidence_R for name in cover.stale}):
            yield Symptom(
                name="uncovered",
                module=name,
                evidence="its experts have gradients, but no optimiser that steps holds them; one holds tensors "
                "that are of no module any more",
                remedy="make the optimiser after the model is parallelised: that replaces the experts' parameters",
            )


class Heart(Examiner):
    """An Elastic of this model that does not beat with its steps."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.beats = {id(elastic): elastic.steps for elastic in _elastics(case)}

    def evidence(self) -> Any:
        return [
            (elastic.steps - self.beats.get(id(elastic), 0), elastic.steps, elastic.plan_every, elastic.pulse)
            for elastic in _elastics(self.case)
        ]

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for evidence in evidence_R[:1]:
            for beats, total, plan_every, pulse in evidence:
                if not beats and steps >= SILENT:
                    yield Symptom(
                        name="balancer-dead",
                        module="",
                        evidence=f"Elastic did not step once in {steps} steps of the optimiser; its last was "
                        f"{pulse.seconds_since_step:.0f} s ago",
                        remedy="call elastic.step() after each settle_prices(model)",
                    )
                elif total >= 3 * plan_every and pulse.steps_since_plan > 2 * plan_every and not pulse.left:
                    yield Symptom(
                        name="balancer-dead",
                        module="",
                        evidence=f"Elastic is to plan every {plan_every} steps and has not for "
                        f"{pulse.steps_since_plan:g}; it says: {pulse.reason}",
                        remedy="give it windows that fit between plannings, and less rest after a migration",
                    )


def _elastics(case: Case) -> list[Elastic]:
    model = getattr(case.model, "module", case.model)
    return [each for each in gc.get_objects() if type(each) is Elastic and each.model in (case.model, model)]
