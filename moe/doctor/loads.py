"""Dead experts, and ranks without tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moe.doctor.examiner import Case, Examiner, Heard
from moe.doctor.symptom import Symptom
from moe.layer import MoE
from routing import Assignment, Choice

EXPECTED = 64


class DeadExperts(Examiner):
    """An expert that got no row where an even share would have been many, over all ranks and steps."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.load = {block.name: np.zeros(block.num_experts) for block in case.blocks}

    def hears(self, heard: Heard) -> None:
        if heard.again or heard.said.chosen_TE is None:
            return
        chosen_TE = heard.said.chosen_TE
        if heard.real_T is not None:
            chosen_TE = chosen_TE & heard.real_T[:, None]
        self.load[heard.block.name] += chosen_TE.sum(dim=0).cpu().numpy()

    def evidence(self) -> Any:
        return self.load

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in evidence_R[0]:
            load_E = sum(evidence[name] for evidence in evidence_R)
            dead = np.flatnonzero(load_E == 0)
            if dead.size and load_E.sum() >= EXPECTED * len(load_E):
                yield Symptom(
                    name="dead-experts",
                    module=name,
                    evidence=f"experts {_listed(dead.tolist())} of {len(load_E)} got none of {int(load_E.sum())} rows "
                    f"in {steps} steps; an even share is {load_E.mean():.0f}",
                    remedy="use a balancer, such as LossFree or Quantile, and look at what drives the router there: "
                    "a bias, a checkpoint that lost lines, a learning rate",
                )


class IdleRanks(Examiner):
    """A rank that computed nothing, or brought no token, in all the steps there were. Of layers of ours alone: a host
    does not say where its rows go."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.rows: dict[str, Any] = {}
        for name, module in case.model.named_modules():
            if isinstance(module, MoE) and module.peers.size > 1:
                self.handles.append(module.observe(self.guarded(self._listener(name or "model"))))

    def _listener(self, name: str) -> Callable[[Choice, Assignment], None]:
        def listen(choice: Choice, assignment: Assignment) -> None:
            both = np.stack([assignment.count_RE.sum(axis=1), np.asarray(assignment.load_R)])
            self.rows[name] = self.rows.get(name, 0) + both

        return listen

    def evidence(self) -> Any:
        return self.rows

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name, (sent_R, load_R) in sorted(evidence_R[0].items()):
            for what, rows_R in (("brought no token", sent_R), ("computed no row", load_R)):
                idle = np.flatnonzero(rows_R == 0)
                if idle.size and rows_R.sum() >= EXPECTED:
                    yield Symptom(
                        name="idle-rank",
                        module=name,
                        evidence=f"ranks {_listed(idle.tolist())} of the layer's {len(rows_R)} {what} in {steps} "
                        f"steps; rows by rank: {_listed([int(rows) for rows in rows_R])}",
                        remedy="look at how batches are dealt to the ranks"
                        if rows_R is sent_R
                        else "use a balancer, an assigner such as LeastLoaded, or another placement",
                    )


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
