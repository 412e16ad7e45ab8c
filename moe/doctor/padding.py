"""Padding that balancers and balancing losses see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from moe.doctor.block import Block
from moe.doctor.counts import counted_padding
from moe.doctor.examiner import Case, Examiner, Heard
from moe.doctor.symptom import Symptom


class PaddingUntold(Examiner):
    """A layer with a balancer that was not told of padding its model knows."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.rows = {block.name: [0, 0] for block in case.blocks if block.feeds and block.settled() is not None}

    def hears(self, heard: Heard) -> None:
        chosen_TE = heard.said.chosen_TE
        rows = self.rows.get(heard.block.name)
        if rows is None or heard.again or not heard.training or chosen_TE is None:
            return
        rows[1] += int(chosen_TE.sum())
        if heard.real_T is not None:
            rows[0] += int(chosen_TE[~heard.real_T].sum())

    def evidence(self) -> Any:
        return self.rows

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in evidence_R[0]:
            padding, rows = (sum(evidence[name][part] for evidence in evidence_R) for part in range(2))
            if padding:
                yield counted_padding(name, padding / rows, steps)


class PaddingPays(Examiner):
    """The loss has a gradient for the router's logits of padding, though none comes through the experts' outputs there:
    a balancing loss counts padding."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.paid = {block.name: [0, 0] for block in case.blocks}
        self.open: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
        for block in case.blocks:
            self.handles.append(block.module.register_forward_hook(self.guarded(self._output(block))))

    def enters(self, block: Block, again: bool) -> None:
        self.open.pop(block.name, None)

    def hears(self, heard: Heard) -> None:
        logits = heard.said.logits
        if (
            heard.again
            or heard.real_T is None
            or logits is None
            or not logits.requires_grad
            or bool(heard.real_T.all())
        ):
            return
        grads: dict[str, Tensor] = {}
        self.open[heard.block.name] = heard.real_T, grads
        real_T, name = heard.real_T, heard.block.name

        def judge(grad: Tensor) -> None:
            """The output's gradient came before."""
            through_T = grads.get("output")
            if through_T is None or grad.numel() != len(real_T) * grad.shape[-1]:
                return
            idle_T = ~real_T & ~through_T
            pays_T = grad.detach().reshape(len(real_T), -1).ne(0).any(dim=-1)
            self.paid[name][0] += int((pays_T & idle_T).sum())
            self.paid[name][1] += int(idle_T.sum())

        logits.register_hook(self.guarded(judge))  # type: ignore[no-untyped-call]

    def _output(self, block: Block) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            known = self.open.get(block.name)
            if known is None or not isinstance(out, Tensor) or not out.requires_grad:
                return
            real_T, grads = known
            if out.numel() == len(real_T) * out.shape[-1]:
                keep = partial(_keep, grads, len(real_T))
                out.register_hook(self.guarded(keep))  # type: ignore[no-untyped-call]

        return hook

    def evidence(self) -> Any:
        return self.paid

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in evidence_R[0]:
            paid, idle = (sum(evidence[name][part] for evidence in evidence_R) for part in range(2))
            if paid:
                yield Symptom(
                    name="padding-counted",
                    module=name,
                    evidence=f"{paid} of {idle} padding tokens, which do not touch the loss through the layer's "
                    f"output, give its router a gradient: a balancing loss counts them ({steps} steps)",
                    remedy="give the loss the mask: attention_mask in transformers, layer(x, valid=mask) in ours",
                )


def _keep(grads: dict[str, Tensor], tokens: int, dy: Tensor) -> None:
    grads["output"] = dy.detach().reshape(tokens, -1).ne(0).any(dim=-1)
