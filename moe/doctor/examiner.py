"""Examiner: looks for one trap. It collects evidence on its rank, and concludes from that of all ranks at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe.doctor.block import Block, Said
from moe.doctor.symptom import Symptom

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What is examined. blocks: by name."""

    model: nn.Module
    blocks: tuple[Block, ...]


class Heard(NamedTuple):
    """One routing. real_T: False for padding, None where nobody said. told: the router was told itself. again: in a
    recomputation."""

    block: Block
    said: Said
    real_T: Tensor | None
    told: bool
    again: bool
    training: bool


class Examiner:
    """All that may be asked of one; each does what concerns it. Nothing here may change a tensor of the run, or end
    it: see `guarded`. failure: why this one ended itself, "" if it did not."""

    failure = ""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.handles: list[RemovableHandle] = []

    def guarded(self, act: Callable[P, T]) -> Callable[P, T | None]:
        """`act`, for whoever calls it from the run: an error in it is the end of this examiner, and of nothing else."""

        def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
            if self.failure:
                return None
            try:
                return act(*args, **kwargs)
            except Exception as error:
                at = extract_tb(error.__traceback__)[-1]
                self.failure = f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
                return None

        return call

    def opens(self) -> None:
        """Before the first forward of a step, and at the end: whatever follows a step has been done."""

    def enters(self, block: Block, again: bool) -> None:
        """A call of a block begins. again: a recomputation."""

    def leaves(self, block: Block, again: bool) -> None:
        """It returns."""

    def hears(self, heard: Heard) -> None:
        """A router chose."""

    def outer(self, out: Any, training: bool) -> None:
        """The model returned this."""

    def clips(self, parameters: Sequence[Tensor], norm_type: float) -> None:
        """Gradients are about to be clipped."""

    def clipped(self, norm: float) -> None:
        """By this norm, it was said."""

    def steps(self, held: Sequence[Tensor]) -> None:
        """An optimiser of these parameters is about to step, the first since the last forward."""

    def close(self) -> None:
        """The examination is over; nothing of it may stay."""
        for handle in self.handles:
            handle.remove()

    def evidence(self) -> Any:
        """Of this rank. It is pickled."""

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        """From that of all ranks, and alike on each of them."""
        yield from ()
