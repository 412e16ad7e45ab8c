"""Symptom: one thing found wrong with a run, and Report: all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """name: the trap. module: where, by the name of a module; "" for the whole model. evidence: what was measured, over
    how many steps. remedy: what to do."""

    name: str
    module: str
    evidence: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found, the same on every rank. steps: of the optimiser, that were seen. blocks: names of the MoE blocks.
    alone: the ranks could not be asked, as this one failed; what takes several ranks to see was not looked for."""

    symptoms: tuple[Symptom, ...]
    steps: int
    blocks: tuple[str, ...]
    ranks: int
    alone: bool = False

    @property
    def clean(self) -> bool:
        return not self.symptoms

    def facts(self) -> dict[str, Any]:
        return {"clean": self.clean, **asdict(self)}

    def show(self, console: Console | None = None) -> None:
        console = Console() if console is None else console
        seen = (
            f"{_counted(len(self.blocks), 'MoE block')}, {_counted(self.steps, 'step')}, {_counted(self.ranks, 'rank')}"
        )
        if self.alone:
            seen += "; this rank failed, so only what it saw itself"
        if self.clean:
            console.print(f"moe-doctor: nothing found ({seen})", markup=False)
            return
        table = Table(title=f"moe-doctor: {_counted(len(self.symptoms), 'symptom')} ({seen})", show_lines=True)
        table.add_column("symptom", no_wrap=True)
        for heading, ratio in (("module", 1), ("evidence", 2), ("remedy", 2)):
            table.add_column(heading, overflow="fold", ratio=ratio)
        for symptom in self.symptoms:
            table.add_row(*map(_escaped, (symptom.name, symptom.module, symptom.evidence, symptom.remedy)))
        console.print(table)


def together(symptoms: Sequence[Symptom]) -> tuple[Symptom, ...]:
    """One line where several modules have the same to say."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for each in symptoms:
        alike.setdefault((each.name, each.evidence, each.remedy), []).append(each.module)
    return tuple(
        Symptom(name=name, module=", ".join(modules), evidence=evidence, remedy=remedy)
        for (name, evidence, remedy), modules in alike.items()
    )


def left_out(examiner: str, failure_R: Sequence[str]) -> Iterator[Symptom]:
    """failure_R: why it failed on each rank, "" where it did not."""
    for failure in sorted(set(failure_R) - {""}):
        ranks = ", ".join(str(rank) for rank, each in enumerate(failure_R) if each == failure)
        yield Symptom(
            name="examiner-failed",
            module="",
            evidence=f"{examiner} failed on rank {ranks}: {failure}",
            remedy="what it looks for was not looked for, all else was; mend the Block if you described it, or report "
            "this as an error of moe-doctor",
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
