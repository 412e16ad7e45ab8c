"""Meters: how even a model's steps are, layer by layer, from the statistics that settling the prices has summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from moe.layer import MoE
from placement import Placement
from routing import Assignment, Balance, Choice, Sink, Tally, dual_gap, optimize, over_layers, rank_share, readings


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

    def __init__(self, model: nn.Module, sinks: Sequence[Sink] = (), *, every: int = 1, gap_steps: int = 0) -> None:
        """gap_steps: tell the dual gap too, of this rank's last batch: how far its prices are from the best, which so
        many steps of `optimize` look for. Twelve will do; 0 tells none. Choices other than a top-k have none.
        """
        if every < 1:
            raise ValueError(f"every={every}; use 1 to tell of every step, or more")
        if gap_steps < 0:
            raise ValueError(f"gap_steps={gap_steps}; use 0 for no dual gap, or about 12")
        self.layers = {name or "moe": module for name, module in model.named_modules() if isinstance(module, MoE)}
        if not self.layers:
            raise ValueError("the model has no MoE layer to read")
        self.sinks, self.every, self.gap_steps = tuple(sinks), every, gap_steps
        self._heard: dict[MoE, Choice] = {}
        for layer in self.layers.values() if gap_steps else ():
            layer.observe(partial(self._hear, layer))
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
            dual_gap=self._gap(layer),
            loss_share=layer.levies.share,
        )

    def _hear(self, layer: MoE, choice: Choice, assignment: Assignment) -> None:
        self._heard[layer] = replace(  # without the graph
            choice,
            weight_N=choice.weight_N.detach(),
            score_TE=choice.score_TE.detach(),
            logit_TE=choice.logit_TE.detach(),
        )

    def _gap(self, layer: MoE) -> Tensor | None:
        choice = self._heard.get(layer)
        if choice is None or choice.top_k != choice.k or choice.k == choice.num_experts:
            return None
        best = optimize(choice.score_TE, choice.price_E, choice.k, self.gap_steps, choice.valid_T)
        return dual_gap(choice.score_TE, choice.price_E, choice.k, kept=best.kept, valid_T=choice.valid_T)
