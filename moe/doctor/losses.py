"""Balancing losses that do not reach the router, or reach it at another scale than they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.doctor.examiner import Case, Examiner, Heard
from moe.doctor.symptom import Symptom
from moe.layer import MoE
from moe.levy import Slip

CLOSE = 0.02
COLLAPSED = 1.5


class _Forward:
    """One forward of the model: what its balancing loss, and what its logits were given in backward."""

    def __init__(self) -> None:
        self.aux: float | None = None
        self.through: float | None = None
        self.reached = False


class _Step(NamedTuple):
    """One step on this rank. passes: forwards with backward. main: the scale of the mean of the model's own loss,
    summed over them, None where it is none; aux: of the balancing loss; detached: forwards that gave it none."""

    passes: int
    main: float | None
    aux: float | None
    detached: int


class AuxLoss(Examiner):
    """The scale of the balancing loss beside that of the model's own.

    The own scale is read from the gradient of the model's logits, where that is s * (softmax - one-hot), line by line.
    The other from the gradient of `aux_loss` in the model's output, over its configured coefficient; of layers of ours,
    from the slips that `charge` writes.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.forwards: list[_Forward] = []
        self.slips: list[list[Slip]] = []
        self.records: list[_Step] = []
        config = getattr(getattr(case.model, "module", case.model), "config", None)
        get_text = getattr(config, "get_text_config", None)
        coefficient = getattr(get_text() if callable(get_text) else config, "router_aux_loss_coef", None)
        self.coefficient = float(coefficient) if isinstance(coefficient, int | float) else 0.0
        self.layers = [module for module in case.model.modules() if isinstance(module, MoE) and module.levies.losses]

    def outer(self, out: Any, training: bool) -> None:
        logits = _logits(out)
        if not training or logits is None or not logits.requires_grad:
            return
        forward = _Forward()
        self.forwards.append(forward)
        value = logits.detach()
        self.slips.append([s for layer in self.layers for ref in layer.levies._open if (s := ref()) is not None])

        def main(grad: Tensor) -> None:
            forward.reached = True
            forward.through = _cross_entropy_scale(value, grad.detach())

        def charged(grad: Tensor) -> None:
            forward.aux = (forward.aux or 0.0) + float(grad)

        logits.register_hook(self.guarded(main))  # type: ignore[no-untyped-call]
        aux = getattr(out, "aux_loss", None)
        if isinstance(aux, Tensor) and self.coefficient and aux.numel() == 1:
            forward.aux = 0.0
            if aux.requires_grad:
                aux.register_hook(self.guarded(charged))  # type: ignore[no-untyped-call]

    def steps(self, held: Sequence[Tensor]) -> None:
        done = [(forward, slips) for forward, slips in zip(self.forwards, self.slips) if forward.reached]
        self.forwards, self.slips = [], []
        if not done:
            return
        scales = [forward.through for forward, _ in done]
        main = None if any(scale is None for scale in scales) else sum(scale for scale in scales if scale is not None)
        hosts = [forward.aux for forward, _ in done if forward.aux is not None]
        unique = {id(slip): slip for _, slips in done for slip in slips if slip.scale is not None}
        if self.layers:
            charged = sum(float(slip.scale) for slip in unique.values() if slip.scale is not None)
            aux: float | None = charged / len(self.layers) if unique else None
        else:
            aux = sum(hosts) / self.coefficient if hosts else None
        self.records.append(_Step(len(done), main, aux, sum(each == 0.0 for each in hosts)))

    def evidence(self) -> Any:
        return self.records

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        records = [record for records in evidence_R for record in records]
        detached, passes = sum(record.detached for record in records), sum(record.passes for record in records)
        if detached:
            yield Symptom(
                name="aux-loss-detached",
                module="",
                evidence=f"the model computed its balancing loss, but in {detached} of {passes} backwards it got no "
                f"gradient ({steps} steps); its coefficient is {self.coefficient:g}",
                remedy="add it to the loss that goes backward: loss = own_loss + coefficient * outputs.aux_loss, or "
                "use outputs.loss; do not detach the router's logits",
            )
            return
        known = [record for record in records if record.main and record.aux]
        ratios = [record.aux / record.main for record in known]
        if not ratios or max(ratios) - min(ratios) > CLOSE * abs(ratios[0]):
            return
        cause = _cause(ratios[0], known[0].passes, len(self.case.blocks), len(evidence_R), self.coefficient)
        if cause is not None:
            yield Symptom(
                name="aux-loss-scale",
                module="",
                evidence=f"beside the model's own loss the balancing loss weighs {ratios[0]:.4g} times what its "
                f"coefficient says: {cause} ({len(ratios)} steps)",
                remedy="scale both losses alike: add them first, then divide by the micro-batches. Ours: "
                "charge(model, loss) / micro_batches",
            )


class Unused(Examiner):
    """A router that returns its balancing loss, which then goes nowhere."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.fired: dict[str, list[int]] = {}

    def hears(self, heard: Heard) -> None:
        aux = heard.said.aux
        if aux is None or heard.again or not aux.requires_grad or not heard.training:
            return
        count = self.fired.setdefault(heard.block.name, [0, 0])
        count[0] += 1

        def hit(grad: Tensor) -> None:
            count[1] += 1

        aux.register_hook(self.guarded(hit))  # type: ignore[no-untyped-call]

    def evidence(self) -> Any:
        return self.fired

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in sorted({name for fired in evidence_R for name in fired}):
            made, used = (sum(fired.get(name, [0, 0])[part] for fired in evidence_R) for part in range(2))
            if steps and made and not used:
                yield Symptom(
                    name="aux-loss-detached",
                    module=name,
                    evidence=f"the router returned its balancing loss {made} times; it never got a gradient ({steps} "
                    "steps)",
                    remedy="add it to the loss that goes backward, times its coefficient",
                )


class PooledLayers(Examiner):
    """A balancing loss that pools all layers, and reads even where each layer for itself has collapsed.

    It is known by its value: the loss that the model returned is the pooled formula of its logits.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.logits: list[Tensor] = []
        self.real_T: Tensor | None = None
        self.seen: list[tuple[float, float]] = []

    def hears(self, heard: Heard) -> None:
        if not heard.again and heard.said.logits is not None:
            self.logits.append(heard.said.logits.detach())
            self.real_T = heard.real_T

    def outer(self, out: Any, training: bool) -> None:
        tables, self.logits = self.logits, []
        aux = getattr(out, "aux_loss", None)
        ks = {block.top_k for block in self.case.blocks}
        if not isinstance(aux, Tensor) or len(tables) < 2 or len(ks) != 1 or len({t.shape for t in tables}) != 1:
            return
        k = ks.pop()
        if k is None:
            return
        real_T = self.real_T
        parts = [_shares(table if real_T is None else table[real_T], k) for table in tables]
        share_LE, mean_LE = (torch.stack([part[at] for part in parts]) for at in range(2))
        experts = share_LE.shape[1]
        pooled = float(experts * (share_LE.mean(dim=0) * mean_LE.mean(dim=0)).sum())
        if abs(pooled - float(aux.detach())) <= CLOSE * pooled:
            each = float(experts * (share_LE * mean_LE).sum(dim=1).mean())
            self.seen.append((pooled / k, each / k))

    def evidence(self) -> Any:
        return self.seen

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        seen = [pair for evidence in evidence_R for pair in evidence]
        if not seen:
            return
        pooled, each = (sum(pair[part] for pair in seen) / len(seen) for part in range(2))
        if each >= COLLAPSED * pooled:
            yield Symptom(
                name="aux-loss-pools-layers",
                module="",
                evidence=f"the balancing loss adds up the loads of all layers before it looks at them and reads "
                f"{pooled:.2f}, where 1 is even; layer by layer it is {each:.2f} ({len(seen)} forwards): imbalance of "
                "one layer hides that of another",
                remedy="take the loss of each layer from its own router_logits and average them, or balance by prices",
            )


def _logits(out: Any) -> Tensor | None:
    logits = getattr(out, "logits", out[0] if isinstance(out, tuple) and out else out)
    return logits if isinstance(logits, Tensor) and logits.ndim >= 2 and logits.is_floating_point() else None


def _cross_entropy_scale(logits: Tensor, grad: Tensor) -> float | None:
    """s of grad = s * mean over tokens of (softmax - one-hot), token by token; None where it is not that."""
    grad_TV = grad.reshape(-1, grad.shape[-1]).double()
    logit_TV = logits.reshape(grad_TV.shape).double()
    told_T = grad_TV.ne(0).any(dim=-1)
    grad_TV, logit_TV = grad_TV[told_T], logit_TV[told_T]
    if not len(grad_TV) or grad_TV.shape[1] < 2:
        return None
    label_T1 = grad_TV.argmin(dim=-1, keepdim=True)
    probability_TV = logit_TV.softmax(dim=-1)
    left_TV = probability_TV - F.one_hot(label_T1[:, 0], grad_TV.shape[1])
    weight_T1 = grad_TV.gather(1, label_T1) / left_TV.gather(1, label_T1).clamp(max=-1e-12)
    good = (grad_TV - weight_T1 * left_TV).norm() <= CLOSE * grad_TV.norm()
    return float(weight_T1.sum()) if bool(good) else None


def _cause(ratio: float, passes: int, layers: int, ranks: int, coefficient: float) -> str | None:
    """A mistake that would make this ratio; None if it is right, or is no known mistake's."""
    if abs(ratio - 1) <= CLOSE:
        return None
    known = [
        (float(passes), f"it is not divided by the {passes} micro-batches of a step, as the own loss is"),
        (1 / passes, f"it is divided by the {passes} micro-batches of a step twice"),
        (float(layers), f"it is summed over the {layers} layers instead of averaged"),
        (1 / layers, f"it is divided by the {layers} layers once too often"),
        (float(ranks), f"it is multiplied by the {ranks} ranks"),
        (1 / ranks, f"it is divided by the {ranks} ranks, and data parallelism averages again"),
        (1 / coefficient if coefficient else 1.0, "the coefficient was not multiplied to it"),
        (coefficient if coefficient else 1.0, "the coefficient was multiplied to it twice"),
    ]
    return next((why for factor, why in known if factor != 1 and abs(ratio - factor) <= CLOSE * factor), None)


def _shares(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows of each expert over tokens, and mean probabilities."""
    probability_TE = logits.float().softmax(dim=-1)
    picked_TE = torch.zeros_like(probability_TE).scatter_(1, probability_TE.topk(k, dim=-1).indices, 1.0)
    return picked_TE.mean(dim=0), probability_TE.mean(dim=0)
