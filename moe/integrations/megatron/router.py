"""Prices in Megatron's router: its logits, scores, groups, losses and weights stay as they are, its choice is ours.

Megatron lets a RouterReplay stand between its scores and its top-k (`TopKRouter.router_replay`). There the prices sit.
They are in the units of what it chooses by: scores with a sigmoid or `moe_router_pre_softmax`, else logits. A choice is
made once: a recomputation repeats it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe.integrations.megatron.versions import groups_of, taken_by
from moe.integrations.told import ToldRouter
from routing import Balancer, Choice, Rows, Tokens, Unpriced, token_major

ComputeTopK = Callable[..., tuple[Tensor, Tensor]]


class Prices(ToldRouter):
    """The prices of one Megatron router. valid_T: of the tokens it is about to be asked for."""

    def __init__(self, config: TransformerConfig, balancer: Balancer, device: torch.device | str) -> None:
        num_experts, top_k = config.num_moe_experts, config.moe_router_topk
        super().__init__(num_experts, top_k, balancer=balancer, device=device)
        self.valid_T: Tensor | None = None
        self._host: Callable[[Tensor], Tensor] | None = None

    def select_rows(self, score_TE: Tensor, price_E: Tensor, tokens: Tokens) -> Rows:
        """By the host's own top-k, which knows its groups."""
        if self._host is None or isinstance(self.balancer, Unpriced):
            return super().select_rows(score_TE, price_E, tokens)
        return token_major(self._host(score_TE - price_E))

    def choose_for(self, score_TE: Tensor, host: Callable[[Tensor], Tensor]) -> Tensor:
        """In place of the host's choice. -> expert_TK, all of them experts, of padding too"""
        if self.price_E.device != score_TE.device:  # prices that no model has registered stay behind
            self.to(score_TE.device)
        self._host = host
        try:
            return self.ask(score_TE, host, self.valid_T)
        finally:
            self._host = None

    def told_by_map(self, probs_TE: Tensor, map_TE: Tensor, rows: Rows | None) -> Choice:
        """Megatron's tables as rows. What it dropped, and padding, goes nowhere; and never is a row left out, as that
        would need their number on the host."""
        num_experts, k = len(self.price_E), self.top_k
        if self.heard is not None:
            expert_TK = self.heard.expert_TK.clamp(min=0)
        else:
            expert_TK = map_TE.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :k]
        goes_TK = map_TE.gather(1, expert_TK)
        if self.valid_T is not None:
            goes_TK = goes_TK & self.valid_T[:, None]
        weight_TK = probs_TE.gather(1, expert_TK)
        return self.told(expert_TK.where(goes_TK, num_experts), weight_TK, rows, self.valid_T)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A checkpoint of Megatron's own layer has no prices: those here stay as they are."""
        for name in ("price_E", "settled"):
            state_dict.setdefault(prefix + name, self.get_buffer(name))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Seam:
    """What Megatron takes for its RouterReplay. inner: the one it had, if any; it still records and replays."""

    def __init__(self, prices: Prices, inner: Any) -> None:
        self.prices, self.inner = prices, inner
        self.layer_number: int | None = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert default_compute_topk is not None

        def host(score_TE: Tensor) -> Tensor:
            if self.inner is None:
                return default_compute_topk(score_TE, topk, num_groups, group_topk)[1]
            return self.inner.get_replay_topk(score_TE, topk, num_groups, group_topk, default_compute_topk)[1]  # type: ignore[no-any-return]

        expert_TK = self.prices.choose_for(scores, host)
        return scores.gather(1, expert_TK), expert_TK


def price(router: Any, prices: Prices) -> None:
    """Let these prices have their say in a router's choice."""
    if isinstance(router, PricedRouter):
        raise ValueError("the layer prices its router itself; give it the balancer, and Megatron's TopKRouter")
    if hasattr(router, "router_replay"):
        router.router_replay = Seam(prices, router.router_replay)
    elif not isinstance(prices.balancer, Unpriced):
        raise ValueError(
            f"{type(router).__name__} has no router_replay, where {prices.balancer} would have its say; use a "
            f"TopKRouter of Megatron-Core 0.16 or later"
        )


class PricedRouter(TopKRouter):  # type: ignore[misc]
    """Megatron's TopKRouter with a balancer, for its own MoELayer: `MoESubmodules(router=partial(PricedRouter,
    balancer=LossFree(step=1e-3)), ...)`. (CoreMoELayer prices its router itself.) Settle with `moe.settle_prices`."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        balancer: Balancer = Unpriced(),
        **more: Any,
    ) -> None:
        groups = groups_of(pg_collection, None)
        super().__init__(config=config, pg_collection=groups, **taken_by(TopKRouter, more))
        check_balancer(config, balancer)
        self.prices = Prices(config, balancer, self.weight.device)
        self.router_replay = Seam(self.prices, getattr(self, "router_replay", None))

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.prices.valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        probs_TE, map_TE = super().forward(input, padding_mask)
        choice = self.prices.told_by_map(probs_TE, map_TE, None)
        if self.training and torch._C._current_graph_task_id() == -1:  # else it is a recomputation
            self.prices.observe(choice)
        return probs_TE, map_TE


def check_balancer(config: TransformerConfig, balancer: Balancer) -> None:
    """Raise ValueError where the router would not ask the balancer."""
    if isinstance(balancer, Unpriced):
        return
    if getattr(config, "moe_router_fusion", False):
        raise ValueError(f"moe_router_fusion=True chooses in a kernel that {balancer} cannot reach; use False")
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise ValueError(f"sinkhorn and {balancer} would both balance; use moe_router_load_balancing_type='none'")
    if config.moe_router_enable_expert_bias:
        raise ValueError(f"moe_router_enable_expert_bias and {balancer} would both balance by prices; use one of them")
