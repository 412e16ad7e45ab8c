"""A training loop with two mistakes, examined, mended, and examined again.

python examples/10_doctor.py

The loop tells its MoE layers nothing of padding, and settles prices for every micro-batch instead of every step. Its
loss falls all the same. Your own script can be examined without a change: moe-doctor train.py --its --arguments
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import MoE, MoEConfig, settle_prices
from moe.doctor import doctor
from routing import LossFree

WORDS, DIM, STEPS, MICRO = 50, 32, 4, 2


class Model(nn.Module):
    def __init__(self, *, mended: bool) -> None:
        super().__init__()
        self.mended = mended
        self.embed = nn.Embedding(WORDS, DIM)
        self.moe = MoE(MoEConfig(dim=DIM, hidden=32, num_experts=8, top_k=2, balancer=LossFree(step=1e-2)))
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        valid = attention_mask.bool() if self.mended else None
        logits: Tensor = self.head(x + self.moe(x, valid=valid))
        return logits


def train(model: Model) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for _ in range(MICRO):
            ids = torch.randint(1, WORDS, (8, 24), generator=generator)
            mask = (torch.arange(24) < torch.randint(8, 25, (8, 1), generator=generator)).long()
            ids = ids * mask
            labels = ids.where(mask.bool(), -100)
            logits = model(ids, attention_mask=mask)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / MICRO
            loss.backward()  # type: ignore[no-untyped-call]
            if not model.mended:
                settle_prices(model)
        optimizer.step()
        optimizer.zero_grad()
        if model.mended:
            settle_prices(model)
    return loss.item() * MICRO


if __name__ == "__main__":
    for mended in (False, True):
        torch.manual_seed(0)
        model = Model(mended=mended)
        with doctor(model) as report:
            loss = train(model)
        print(f"{'mended' if mended else 'as it was'}: loss {loss:.3f} after {STEPS} steps")
        report.show()
