"""What the scores themselves tell: a router that is flat, and one that is not in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe.doctor.examiner import Case, Examiner, Heard
from moe.doctor.symptom import Symptom

SPREAD = 0.02
FEW = 64
LOW = (torch.bfloat16, torch.float16)


class FlatRouter(Examiner):
    """Every token scores all experts alike, so a balancing loss is at its minimum whatever the loads are.

    The logits of each token spread by less than 2 % of a unit: at the usual start, 0.02 a weight, it is 0.02 times the
    root of the width.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.spread = {block.name: [0.0, 0.0] for block in case.blocks}

    def hears(self, heard: Heard) -> None:
        logits = heard.said.logits
        if heard.again or logits is None or not logits.numel():
            return
        spread_T = logits.detach().reshape(-1, logits.shape[-1]).float().std(dim=-1)
        if heard.real_T is not None:
            spread_T = spread_T[heard.real_T]
        self.spread[heard.block.name][0] += float(spread_T.sum())
        self.spread[heard.block.name][1] += len(spread_T)

    def evidence(self) -> Any:
        return self.spread

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in evidence_R[0]:
            total = sum(evidence[name][0] for evidence in evidence_R)
            tokens = sum(evidence[name][1] for evidence in evidence_R)
            if tokens >= FEW and total / tokens < SPREAD:
                yield Symptom(
                    name="flat-router",
                    module=name,
                    evidence=f"the logits of a token differ by {total / tokens:.1e} between experts (standard "
                    f"deviation; {int(tokens)} tokens, {steps} steps): every expert has the same probability",
                    remedy="check that the router is trained (in the optimiser, requires_grad, a learning rate) and "
                    "not started at zero; if a balancing loss flattened it, lower its coefficient or use prices",
                )


class RouterPrecision(Examiner):
    """The logits are numbers of a 16-bit type, whatever type they are kept in, so near ties fall by rounding."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.low: dict[str, tuple[str, int, int]] = {}

    def hears(self, heard: Heard) -> None:
        logits = heard.said.logits
        if heard.again or logits is None:
            return
        kind = _rounded_to(logits.detach())
        if kind is not None:
            flipped, tokens = _flips(logits.detach(), heard)
            known = self.low.get(heard.block.name, (kind, 0, 0))
            self.low[heard.block.name] = kind, known[1] + flipped, known[2] + tokens

    def evidence(self) -> Any:
        return self.low

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in sorted({name for evidence in evidence_R for name in evidence}):
            seen = [evidence[name] for evidence in evidence_R if name in evidence]
            flipped, tokens = sum(each[1] for each in seen), sum(each[2] for each in seen)
            flips = f"; in fp32 {flipped / tokens:.1%} of {tokens} tokens choose other experts" if tokens else ""
            yield Symptom(
                name="router-precision",
                module=name,
                evidence=f"every logit of the router is a {seen[0][0]} number{flips}",
                remedy="compute the logits in fp32, outside autocast: "
                "F.linear(x.float(), weight.float()) under torch.autocast(enabled=False)",
            )


def _rounded_to(logits: Tensor) -> str | None:
    """The 16-bit type whose numbers all of these are, if there are enough to tell."""
    if logits.dtype in LOW:
        return str(logits.dtype).removeprefix("torch.")
    finite = logits[logits.isfinite()]
    if len(torch.unique(finite)) < FEW:
        return None
    for dtype in LOW:
        if torch.equal(finite.to(dtype).to(finite.dtype), finite):
            return str(dtype).removeprefix("torch.")
    return None


def _flips(logits: Tensor, heard: Heard) -> tuple[int, int]:
    """Tokens whose top-k of logits is another in fp32, and of how many; none where it cannot be told."""
    x_TD, router = heard.said.x_TD, heard.block.router
    weight = getattr(router, "weight", None)
    chosen_TE = heard.said.chosen_TE
    k = heard.block.top_k or (int(chosen_TE[0].sum()) if chosen_TE is not None and len(chosen_TE) else 0)
    if (
        x_TD is None
        or not isinstance(weight, nn.Parameter)
        or weight.shape != (logits.shape[-1], x_TD.shape[-1])
        or not k
    ):
        return 0, 0
    bias = getattr(router, "bias", None)
    with torch.autocast(logits.device.type, enabled=False):
        exact_TE = nn.functional.linear(x_TD.float(), weight.float(), None if bias is None else bias.float())
    low_TE = logits.reshape(-1, logits.shape[-1])
    if not torch.allclose(low_TE.float(), exact_TE, rtol=0.05, atol=0.05 * float(exact_TE.abs().max())):
        return 0, 0
    picked, exact = (table.topk(k, dim=-1).indices.sort(dim=-1).values for table in (low_TE.float(), exact_TE))
    flipped_T = (picked != exact).any(dim=-1)
    if heard.real_T is not None:
        flipped_T = flipped_T[heard.real_T]
    return int(flipped_T.sum()), len(flipped_T)
