"""doctor: attend a model for some steps, and report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from moe.comm import EVERYONE, Peers, gather_objects
from moe.doctor.agreement import Agreement, PriceUse
from moe.doctor.attend import Attendance
from moe.doctor.block import Block
from moe.doctor.counts import Counts
from moe.doctor.coverage import Coverage, Heart
from moe.doctor.examiner import Case, Examiner
from moe.doctor.gradients import ExpertGradients, GradNorm
from moe.doctor.hosts import find_blocks
from moe.doctor.loads import DeadExperts, IdleRanks
from moe.doctor.losses import AuxLoss, PooledLayers, Unused
from moe.doctor.padding import PaddingPays, PaddingUntold
from moe.doctor.prices import PriceClock
from moe.doctor.scores import FlatRouter, RouterPrecision
from moe.doctor.symptom import Report, Symptom, left_out, together

EXAMINERS: tuple[type[Examiner], ...] = (
    Counts, PaddingUntold, PaddingPays, AuxLoss, Unused, PooledLayers, PriceClock, Agreement, PriceUse,
    ExpertGradients, GradNorm, RouterPrecision, FlatRouter, DeadExperts, IdleRanks, Coverage, Heart,
)  # fmt: skip


class Examination:
    """One model under examination, until `conclude`."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block] = ()) -> None:
        found = tuple(find_blocks(model, blocks))
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no MoE block that the doctor knows; describe yours: "
                f"doctor(model, blocks=[Block(...)])"
            )
        self.case = Case(model=model, blocks=found)
        self.examiners = [_begun(kind, self.case) for kind in EXAMINERS]
        self.attendance = Attendance(model, found, self.examiners)
        self.report: Report | None = None

    @property
    def steps(self) -> int:
        return self.attendance.steps

    def close(self) -> None:
        self.attendance.close()
        for examiner in self.examiners:
            examiner.close()

    def conclude(self, *, alone: bool = False) -> Report:
        """Take all hooks off, ask the ranks, and say what was found. alone: do not ask, as others may be gone."""
        if self.report is not None:
            return self.report
        for examiner in self.examiners:
            examiner.guarded(examiner.opens)()
        self.close()
        peers = Peers.of(None if alone else EVERYONE)
        self.report = Report(
            symptoms=self._asked(peers),
            steps=self.steps,
            blocks=tuple(block.name for block in self.case.blocks),
            ranks=peers.size,
            alone=alone and Peers.of(EVERYONE).size > 1,
        )
        return self.report

    def _asked(self, peers: Peers) -> tuple[Symptom, ...]:
        """What was found. An examiner that failed on a rank, here or before, is left out on all, and they say so."""

        def concluded(each: Examiner, evidence_R: Sequence[Any]) -> list[Symptom]:
            return list(each.conclude(evidence_R, self.steps))

        every, said = self.examiners, []
        told_R = gather_objects([(each.guarded(each.evidence)(), each.failure) for each in every], peers)
        for each, own_R in zip(every, zip(*told_R)):
            evidence_R, failures = zip(*own_R)
            said.append(None if any(failures) else each.guarded(concluded)(each, evidence_R))
        failure_R = gather_objects([each.failure for each in every], peers)  # a rank may fail in concluding, too
        found: dict[tuple[str, str], Symptom] = {}
        failed: list[Symptom] = []
        for each, symptoms, failures in zip(every, said, zip(*failure_R)):
            if any(failures):
                failed += left_out(type(each).__name__, failures)
                continue
            for symptom in symptoms or ():
                found.setdefault((symptom.name, symptom.module), symptom)
        return together([*found.values(), *failed])


def _begun(kind: type[Examiner], case: Case) -> Examiner:
    """One that cannot begin has failed like any other, and keeps its name."""
    examiner = kind.__new__(kind)
    examiner.guarded(kind.__init__)(examiner, case)
    return examiner


class Pending:
    """What `doctor` hands out; the report is there when its block has ended."""

    def __init__(self, examination: Examination) -> None:
        self._examination = examination

    @property
    def report(self) -> Report:
        if self._examination.report is None:
            raise ValueError("the examination is not over; read the report after the `with`")
        return self._examination.report

    def __getattr__(self, name: str) -> Any:
        return getattr(self.report, name)


@contextmanager
def doctor(model: nn.Module, blocks: Sequence[Block] = ()) -> Iterator[Pending]:
    """Watch a model's training, or its inference, for some steps, and say what is wrong with it.

        with doctor(model) as report:
            for batch in batches:  # a few steps
                ...
        report.show()

    On every rank, and all of them alike: at the end they exchange what they saw. It reads values on the host all the
    time, so steps are slow while it watches; their numbers are the same to the bit. blocks: MoE blocks of a kind that
    it does not know. Within a step it must see every micro-batch: begin and end it between steps.
    """
    examination = Examination(model, blocks)
    try:
        yield Pending(examination)
    except BaseException:
        examination.conclude(alone=True)
        raise
    examination.conclude()
