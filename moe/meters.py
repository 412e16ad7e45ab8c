"""Meters: how even a model's steps are, layer by layer, from the statistics that settling the prices has summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe.layer import MoE
from placement import Placement
from routing import Balance, Sink, Tally, over_layers, rank_share, readings


class Meters:
    """Reads every MoE layer of a model after each `settle_prices`, and tells its sinks once every so many steps.

        meters = Meters(model, [Console(), JsonLines(path)], every=100)
        for step, batch in enumerate(batches):
            ...
            optimizer.step()
            settle_prices(model)
            meters.read(step)

    The loads are those of all ranks and micro-batches, so every rank reads the same; give sinks to one of them. Only
    loss_share is of the last loss that this rank charged. The host waits for the device in steps that are told, and in
    no other. `tally` has the mean and the worst of all steps.
    """

    def __init__(self, model: nn.Module, sinks: Sequence[Sink] = (), *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every}; use 1 to tell of every step, or more")
        self.layers = {name or "moe": module for name, module in model.named_modules() if isinstance(module, MoE)}
        if not self.layers:
            raise ValueError("the model has no MoE layer to read")
        self.sinks, self.every = tuple(sinks), every
        experts = {layer.config.num_experts for layer in self.layers.values()}
        if len(experts) > 1:
            raise ValueError(f"layers of {sorted(experts)} experts have no common tally; use Meters for each kind")
        first = next(iter(self.layers.values()))
        self.tally = Tally.empty(len(self.layers), experts.pop(), first.router.price_E.device)
        self._share: dict[str, tuple[Placement, Tensor]] = {}

    def read(self, step: int) -> dict[str, dict[str, float]]:
        """After the prices of this step were settled. -> layer -> metric -> number, and their means; {} if not told."""
        if not all(layer.router.closed for layer in self.layers.values()):
            raise ValueError("no step was settled yet; call settle_prices(model) before the meters read")
        self.tally = self.tally.add(torch.stack([layer.router.closed["load_E"] for layer in self.layers.values()]))
        if step % self.every:
            return {}
        balances = [self._balance(layer, self._share_RE(name)) for name, layer in self.layers.items()]
        told = readings(dict(zip(self.layers, balances)))
        told |= over_layers(told)
        for sink in self.sinks:
            sink(step, told)
        return told

    def _share_RE(self, name: str) -> Tensor:
        """Of each expert's load, what each rank computes. Made again when experts have moved."""
        layer = self.layers[name]
        known = self._share.get(name)
        if known is None or known[0] is not layer.placement:
            known = self._share[name] = (layer.placement, rank_share(layer.placement, layer.router.price_E.device))
        return known[1]

    def _balance(self, layer: MoE, share_RE: Tensor) -> Balance:
        closed = layer.router.closed
        return Balance.of(
            closed["kept_E"],
            layer.router.price_E,
            score_range=layer.config.score.range,
            mean_score_E=closed["score_E"] / closed["score_E"].sum().clamp(min=1e-20),
            wanted_E=closed["load_E"],
            share_RE=share_RE,
            loss_share=layer.levies.share,
        )
