"""Do all ranks have the same prices, and do prices decide?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.doctor.examiner import Case, Examiner, Heard
from moe.doctor.symptom import Symptom

FEW_TOKENS = 8


class Agreement(Examiner):
    """Prices that differ between ranks. Only ranks whose routers started alike are compared: others may hold another
    layer of the same name, as pipeline stages do."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.start = {
            block.name: _digest(block.router.parameters() if block.router is not None else ()) for block in case.blocks
        }
        self.prices: dict[str, list[str]] = {block.name: [] for block in case.blocks}

    def opens(self) -> None:
        for block in self.case.blocks:
            if (price_E := block.price()) is not None:
                self.prices[block.name].append(_digest([price_E]))

    def evidence(self) -> Any:
        return self.start, self.prices

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name, mine in evidence_R[0][1].items():
            others = [prices[name] for start, prices in evidence_R if start.get(name) == evidence_R[0][0][name]]
            apart = [
                at for at in range(len(mine)) if any(at < len(other) and other[at] != mine[at] for other in others)
            ]
            if apart:
                yield Symptom(
                    name="price-disagreement",
                    module=name,
                    evidence=f"the ranks' prices differ from step {apart[0]} of {steps} on, though their routers "
                    f"started alike: {len({tuple(other) for other in others})} versions on {len(others)} ranks",
                    remedy="sum the loads over all ranks that see different tokens before prices are settled: "
                    "settle_prices(model, group), with buffers kept from DDP's broadcast (leave_experts_alone)",
                )


class PriceUse(Examiner):
    """Prices that do not decide: every choice is the top-k of the scores without them, or with them added."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.differ = {block.name: {"ignored": 0, "reversed": 0} for block in case.blocks}
        self.right: set[str] = set()
        self.odd: dict[str, set[str]] = {"ignored": set(), "reversed": set()}

    def hears(self, heard: Heard) -> None:
        score_TE, chosen_TE = heard.said.score_TE, heard.said.chosen_TE
        price_E = heard.said.price_E
        if heard.again or score_TE is None or chosen_TE is None or price_E is None or not len(chosen_TE):
            return
        score_TE, price_E = score_TE.detach(), price_E.detach().to(score_TE.dtype)
        real_T = chosen_TE.any(dim=-1)
        k = int(chosen_TE.sum(dim=-1).max())
        if k == 0 or not bool((chosen_TE.sum(dim=-1)[real_T] == k).all()):
            return
        want_TE = _top(score_TE - price_E, k)
        for how, guess_TE in (("ignored", _top(score_TE, k)), ("reversed", _top(score_TE + price_E, k))):
            if bool((chosen_TE != guess_TE)[real_T].any()):
                self.odd[how].add(heard.block.name)
            self.differ[heard.block.name][how] += int((want_TE != guess_TE).any(dim=-1)[real_T].sum())

    def evidence(self) -> Any:
        return {
            name: {how: 0 if name in self.odd[how] else tokens for how, tokens in differ.items()}
            for name, differ in self.differ.items()
        }

    def conclude(self, evidence_R: Sequence[Any], steps: int) -> Iterator[Symptom]:
        for name in evidence_R[0]:
            for how in ("ignored", "reversed"):
                tokens = [evidence[name][how] for evidence in evidence_R]
                if min(tokens) >= FEW_TOKENS:
                    yield Symptom(
                        name=f"price-{how}",
                        module=name,
                        evidence=f"every token chose as if prices were {'none' if how == 'ignored' else 'negative'}; "
                        f"with them {sum(tokens)} tokens would have chosen otherwise ({steps} steps)",
                        remedy="choose the top-k of the score less the price (the score plus the bias), and weigh by "
                        "the score alone",
                    )


def _top(table_TE: Tensor, k: int) -> Tensor:
    return torch.zeros_like(table_TE, dtype=torch.bool).scatter_(1, table_TE.topk(k, dim=-1).indices, True)


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
