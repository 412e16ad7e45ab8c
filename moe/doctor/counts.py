"""What a balancer counts, against what was chosen: padding counted as load, and rows counted twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.doctor.block import Block
from moe.doctor.examiner import Case, Examiner, Heard
from moe.doctor.symptom import Symptom


class Counts(Examiner):
    """Compares, whole number by whole number, what the counters of a block gained in training with the first forwards
    of its tokens: all of them, and without padding."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.sums = {
            block.name: {
                what: torch.zeros(block.num_experts, dtype=torch.float64) for what in ("gained", "all", "real")
            }
            for block in case.blocks
        }
        self.before: dict[str, Tensor] = {}
        self.again: dict[str, bool] = {}
        self.unknown: set[str] = set()

    def enters(self, block: Block, again: bool) -> None:
        counts_E = block.counts()
        if counts_E is not None and block.module.training:
            self.before[block.name] = counts_E.detach().clone()

    def leaves(self, block: Block, again: bool) -> None:
        before_E, counts_E = self.before.pop(block.name, None), block.counts()
        if before_E is not None and counts_E is not None:
            self.sums[block.name]["gained"] += (counts_E.detach().double() - before_E.double()).cpu()
            self.again[block.name] = self.again.get(block.name, False) or again

    def hears(self, heard: Heard) -> None:
        if heard.again or not heard.training or heard.block.name not in self.before:
            return
        chosen_TE = heard.said.chosen_TE
        if chosen_TE is None:
            self.unknown.add(heard.block.name)
            return
        sums = self.sums[heard.block.name]
        sums["all"] += chosen_TE.sum(dim=0).double().cpu()
        real_TE = chosen_TE if heard.real_T is None else chosen_TE & heard.real_T[:, None]
        sums["real"] += real_TE.sum(dim=0).double().cpu()

    def evidence(self) -> Any:
        return {
            name: (sums["gained"].tolist(), sums["all"].tolist(), sums["real"].tolist(), self.again.get(name, False))
            for name, sums in self.sums.items()
            if name not in self.unknown
        }

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        feeds = {block.name: block.feeds or block.settled() is None for block in self.case.blocks}
        for name in evidence_R[0]:
            seen = [evidence[name] for evidence in evidence_R if name in evidence]
            gained, every, real = (torch.tensor([each[part] for each in seen]).sum(dim=0) for part in range(3))
            if not gained.any() or not feeds[name]:
                continue
            if torch.equal(gained, 2 * every) or torch.equal(gained, 2 * real):
                yield _twice(name, gained, every, any(each[3] for each in seen), steps)
            elif torch.equal(gained, every) and not torch.equal(every, real):
                yield counted_padding(name, float((every - real).sum() / every.sum()), steps)


def _twice(name: str, gained: Tensor, every: Tensor, again: bool, steps: int) -> Symptom:
    why = "in forwards and in their recomputations" if again else "without any recomputation"
    return Symptom(
        name="counted-twice",
        module=name,
        evidence=f"the balancer counted {int(gained.sum())} rows where {int(every.sum())} were chosen, each twice, "
        f"{why} ({steps} steps)",
        remedy="count in the first forward alone: a recomputation runs inside backward. A sign rule hides this; "
        "proportional rules, histograms and pooled losses do not",
    )


def counted_padding(name: str, share: float, steps: int) -> Symptom:
    return Symptom(
        name="padding-counted",
        module=name,
        evidence=f"{share:.1%} of the rows that the balancer counted belong to padding ({steps} steps)",
        remedy="leave padding out of the counts: MoE layers of ours take it as layer(x, valid=mask)",
    )
