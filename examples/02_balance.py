"""One layer, one skewed stream of tokens, and what each balancer makes of it.

    python examples/02_balance.py

MaxVio is the busiest expert's load over the mean, less 1. LossFree learns prices from loads and needs many steps; Bip
finds prices for each batch from the batch itself; Quantile does both; a balancing loss teaches the router instead.
"""

from __future__ import annotations

import torch

from moe import Meters, MoE, MoEConfig, charge, settle_prices
from routing import Bip, LossFree, Quantile, SwitchLoss, Unpriced

DIM, EXPERTS, TOKENS, STEPS = 32, 16, 1024, 120
BALANCE = {
    "none": (Unpriced(), ()),
    "SwitchLoss": (Unpriced(), (SwitchLoss(coefficient=1e-2),)),
    "LossFree": (LossFree(step=1e-3), ()),
    "Bip": (Bip(rounds=4), ()),
    "Quantile": (Quantile(), ()),
}


def main() -> None:
    print(f"{'':>10} {'step 1':>8} {'step ' + str(STEPS):>9} {'mean':>6} {'loss':>6}")
    for name, (balancer, losses) in BALANCE.items():
        torch.manual_seed(0)
        config = MoEConfig(dim=DIM, hidden=32, num_experts=EXPERTS, top_k=4, balancer=balancer, losses=losses)
        layer = MoE(config)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        meters, seen = Meters(layer), []
        pull, target = torch.randn(DIM), torch.randn(DIM, DIM) / DIM**0.5
        for step in range(STEPS):
            x = torch.randn(TOKENS, DIM) + pull  # all tokens lean the same way: some experts are everybody's favourites
            loss = (layer(x) - (x @ target).tanh()).square().mean()
            optimizer.zero_grad()
            loss = charge(layer, loss)  # adds the balancing losses, if there are any
            torch.autograd.backward(loss)
            optimizer.step()
            settle_prices(layer)  # once per optimiser step: sums over ranks and micro-batches, sets new prices
            seen.append(meters.read(step)["moe"]["max_vio"])
        print(f"{name:>10} {seen[0]:8.2f} {seen[-1]:9.2f} {meters.tally.avg.item():6.2f} {loss.item():6.3f}")


if __name__ == "__main__":
    main()
