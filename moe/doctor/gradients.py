"""Expert gradients scaled unlike the others', and gradient norms that count experts wrongly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe.doctor.block import Weight
from moe.doctor.examiner import Case, Examiner
from moe.doctor.linear import Columns, Through, columns, scale
from moe.doctor.symptom import Symptom

REFERENCES = 3
OFF = 0.05
RANKS_AGREE = 1e-4
ROUGH, ROUGH_16 = 5e-3, 2e-2  # torch adds up squares in the type of the gradients


class _Sample(NamedTuple):
    """One step on this rank: (W dW, y dy) of each reference and of each block's experts."""

    plain: dict[str, tuple[Columns, Columns]]
    expert: dict[str, tuple[Columns, Columns, int]]


class ExpertGradients(Examiner):
    """How an expert's gradient was scaled, divided by how a plain linear layer's was: one, or their learning rates are
    not alike. Both are measured, by what went through them on all ranks, just before clipping or the step."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.samples: list[_Sample] = []
        self.taken = False
        self.through: dict[str, Through] = {}
        self.plain: dict[str, nn.Linear] = {}
        inside = {inner for block in case.blocks if block.experts is not None for inner in block.experts.modules()}
        for name, module in case.model.named_modules():
            if type(module) is nn.Linear and module not in inside and len(self.plain) < REFERENCES:
                self.plain[name] = module
                self._watch(f"plain {name}", module)
        for block in case.blocks:
            if block.experts is not None and block.held is not None:
                self._watch(block.name, block.experts)

    def _watch(self, name: str, module: nn.Module) -> None:
        through = self.through[name] = Through(guard=self.guarded)

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                through.watch(out)

        self.handles.append(module.register_forward_hook(self.guarded(hook)))

    def clips(self, parameters: Sequence[Tensor], norm_type: float) -> None:
        self._take()

    def steps(self, held: Sequence[Tensor]) -> None:
        self._take()
        self.taken = False
        for through in self.through.values():
            through.clear()

    def _take(self) -> None:
        if self.taken:
            return
        self.taken = True
        plain, expert = {}, {}
        for name, module in self.plain.items():
            weights = [Weight(parameter=p, axis=0) for p in module.parameters()]
            got, want = columns(weights), self.through[f"plain {name}"].total
            if got is not None and want is not None:
                plain[name] = got, want
        for block in self.case.blocks:
            if block.experts is None or block.held is None or not (weights := list(block.down())):
                continue
            got, want = columns(weights), self.through[block.name].total
            width = weights[0].parameter.shape[weights[0].axis]
            if got is None and all(weight.parameter.grad is None for weight in weights):
                got = np.zeros(width)
            if got is not None and (want is None or len(want) == width):
                expert[block.name] = got, np.zeros(width) if want is None else want, block.held()
        self.samples.append(_Sample(plain, expert))

    def evidence(self) -> Any:
        return self.samples

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        experts = {block.name: block.num_experts for block in self.case.blocks}
        found: dict[str, list[float]] = {}
        for sample_R in zip(*evidence_R):
            plain = _plain_scale([sample.plain for sample in sample_R])
            for name in sample_R[0].expert if plain is not None else ():
                if all(name in sample.expert for sample in sample_R):
                    quotient = _expert_scale([sample.expert[name] for sample in sample_R], experts[name])
                    if quotient is not None and plain is not None:
                        found.setdefault(name, []).append(quotient / plain)
        for name, quotients in found.items():
            middle = float(np.median(quotients))
            if abs(middle - 1) > OFF and max(quotients) - min(quotients) <= OFF * abs(middle):
                yield _scaled(name, middle, len(quotients), len(evidence_R))


def _plain_scale(plain_R: Sequence[dict[str, tuple[Columns, Columns]]]) -> float | None:
    """Of a layer that all ranks have, and whose gradient they agree on."""
    for name in plain_R[0]:
        if all(name in plain and plain[name][0].shape == plain_R[0][name][0].shape for plain in plain_R):
            got = plain_R[0][name][0]
            if all(np.allclose(plain[name][0], got, rtol=1e-3, atol=1e-3 * np.abs(got).max()) for plain in plain_R):
                c = scale(got, np.sum([plain[name][1] for plain in plain_R], axis=0))
                if c is not None:
                    return c
    return None


def _expert_scale(expert_R: Sequence[tuple[Columns, Columns, int]], num_experts: int) -> float | None:
    """Each expert counted once, however many groups of ranks hold it."""
    copies = sum(held for _, _, held in expert_R) / num_experts
    if copies < 1 or copies != int(copies):
        return None
    got = np.sum([got for got, _, _ in expert_R], axis=0)
    return scale(got / copies, np.sum([want for _, want, _ in expert_R], axis=0))


def _scaled(name: str, factor: float, steps: int, ranks: int) -> Symptom:
    whose = ""
    for number, what in ((ranks, "the number of ranks"), (1 / ranks, "1 over the number of ranks")):
        if ranks > 1 and abs(factor - number) <= OFF * number:
            whose = f", {what}"
    return Symptom(
        name="expert-gradient-scale",
        module=name,
        evidence=f"the experts' gradients are {factor:.3g} times those of the other parameters{whose}: each measured "
        f"against what went through it ({steps} steps)",
        remedy="an expert's gradient holds the tokens of all ranks already: divide it by the ranks that data "
        "parallelism averages over (average_expert_grads), once, and sum it over replicas alone",
    )


class _Norm(NamedTuple):
    """One clipping on this rank. plain: power of the gradients that all ranks have. expert: of those it holds, and how
    many of each block's. rough: how far a right norm may be off by rounding. told: the norm it was clipped by."""

    norm_type: float
    plain: float
    expert: dict[str, tuple[float, int]]
    rough: float
    told: float


class GradNorm(Examiner):
    """The norm by which gradients were clipped, against one that counts each expert of every rank once."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.norms: list[_Norm] = []
        self.open: _Norm | None = None

    def clips(self, parameters: Sequence[Tensor], norm_type: float) -> None:
        self.open = None
        expert: dict[str, tuple[float, int]] = {}
        clipped, of_experts = {id(p) for p in parameters}, set()
        for block in self.case.blocks:
            if block.experts is None or block.held is None:
                continue
            own = list(block.experts.parameters())
            of_experts |= {id(p) for p in own}
            if own and not {id(p) for p in own} <= clipped:
                return
            counted = next((weight.counted_A for weight in block.down()), None)
            power = sum(_power(p, norm_type, counted) for p in own)
            expert[block.name] = power, block.held()
        plain = sum(_power(p, norm_type, None) for p in parameters if id(p) not in of_experts)
        low = any(p.grad is not None and p.grad.itemsize < 4 for p in parameters)
        self.open = _Norm(norm_type, plain, expert, ROUGH_16 if low else ROUGH, 0.0)

    def clipped(self, norm: float) -> None:
        if self.open is not None and self.open.expert and self.open.norm_type != math.inf:
            self.norms.append(self.open._replace(told=norm))

    def evidence(self) -> Any:
        return self.norms

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        experts = {block.name: block.num_experts for block in self.case.blocks}
        wrong = []
        for norm_R in zip(*evidence_R):
            plain = norm_R[0].plain
            if any(abs(norm.plain - plain) > 1e-3 * plain for norm in norm_R):
                continue  # not reduced yet
            whole = plain
            for name, num_experts in experts.items():
                if all(name in norm.expert for norm in norm_R):
                    copies = sum(norm.expert[name][1] for norm in norm_R) / num_experts
                    whole += sum(norm.expert[name][0] for norm in norm_R) / max(copies, 1.0)
            whole **= 1 / norm_R[0].norm_type
            told_R = [norm.told for norm in norm_R]
            apart = max(told_R) - min(told_R) > RANKS_AGREE * whole
            if apart or any(abs(told - whole) > norm_R[0].rough * whole for told in told_R):
                wrong.append((told_R, whole))
        if wrong:
            told_R, whole = wrong[0]
            yield Symptom(
                name="grad-norm",
                module="",
                evidence=f"in {len(wrong)} of {len(evidence_R[0])} clippings the norm was "
                f"{', '.join(f'{told:.4g}' for told in told_R[:8])} by rank; with each expert of every rank counted "
                f"once it is {whole:.4g}",
                remedy="use moe.clip_grad_norm (ExpertGradients(max_norm=...) in Trainer): torch's own knows the "
                "experts of its rank alone, so every rank clips differently",
            )


def _power(parameter: Tensor, norm_type: float, counted: tuple[int, ...] | None) -> float:
    grad = parameter.grad
    if grad is None or type(grad) is not Tensor:
        return 0.0
    if counted is not None:
        grad = grad[list(counted)]
    return float(torch.linalg.vector_norm(grad.double(), norm_type)) ** norm_type if grad.numel() else 0.0
