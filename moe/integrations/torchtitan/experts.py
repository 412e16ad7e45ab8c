"""BalancedExperts: torchtitan's routed experts, some of them on visits.

A dispatcher cannot lend: torchtitan's experts compute with their own weights alone. So this takes the place of both,
with torchtitan's parameters, under its names and shardings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts

from moe.activation import SwiGLU
from moe.comm import Lending, Peers, gather_counts, here, unseen, visitors
from moe.compute import Fastest
from moe.dispatch import Dispatch
from moe.guests import Guests, KeepGuests, Nobody
from moe.integrations.fsdp import in_order
from moe.recompute import Replays
from moe.stack import Stack
from moe.visit import visit
from routing import Assigner, Choice, LeastLoaded, Loan, Rows, token_major


class _Step(NamedTuple):
    rows: Rows
    dispatch: Dispatch
    loans: tuple[Loan, ...]


class BalancedExperts(RoutedExperts):  # type: ignore[misc]
    """Under expert parallelism, whatever the assigner says; without it, torchtitan's own way.

    The type of the matmuls is that of the tokens, not always bf16. Each forward joins w1 and w3, which are one matrix
    to us: a copy of two thirds of the weights that this rank holds.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):  # type: ignore[misc]
        assigner: Assigner = field(default_factory=LeastLoaded)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if type(self.inner_experts) is not GroupedExperts:
            raise ValueError(
                f"the experts are {type(self.inner_experts).__name__}, which compute in a way of their own; evenmoe "
                f"lends the weights of torchtitan's GroupedExperts. Use overrides.at_home, which leaves experts alone"
            )
        self.assigner = config.assigner
        self.num_experts: int = config.inner_experts.num_experts
        self.loans: tuple[Loan, ...] = ()
        self._replays: Replays[_Step] = Replays()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        mesh = getattr(self.token_dispatcher, "ep_mesh", None)
        if mesh is None:
            whole: Tensor = super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)
            return whole
        peers, width = Peers.of(mesh), topk_scores_BLK.shape[-1]
        x_TD, score_TK = x_BLD.reshape(-1, x_BLD.shape[-1]), topk_scores_BLK.reshape(-1, width)
        step = self._replays.find()
        if step is None:
            choice = _choice(token_major(topk_expert_ids_BLK.reshape(-1, width).long()), score_TK, self.num_experts)
            step = self._decide(choice, peers)
        self._replays.keep(step)
        self.loans = step.loans
        choice = _choice(step.rows, score_TK, self.num_experts)
        own, guests = self._weights(x_TD.dtype), self._guests(step.loans, peers)
        y_TD = visit(x_TD, choice.weight_N, step.dispatch, own, guests, Fastest(), SwiGLU())
        return y_TD.view(x_BLD.shape)

    def _decide(self, choice: Choice, peers: Peers) -> _Step:
        with unseen():
            placement = in_order(self.num_experts, peers.size)
            assignment = self.assigner(gather_counts(choice.load_E, peers), placement)
            loans = assignment.loans(placement)
            active = [*placement.experts_of(peers.rank).tolist(), *visitors(loans, peers.rank)]
            dispatch = Dispatch.of(choice, assignment, active, peers)
        return _Step(Rows(choice.token_N, choice.expert_N, choice.top_k, choice.wanted_N), dispatch, loans)

    def _weights(self, dtype: torch.dtype) -> Stack:
        inner: Any = self.inner_experts
        up_SFD = torch.cat([here(inner.w1_EFD).to(dtype), here(inner.w3_EFD).to(dtype)], dim=1)
        return Stack(up_SFD, here(inner.w2_EDF).to(dtype), None, None)

    def _guests(self, loans: tuple[Loan, ...], peers: Peers) -> Guests:
        if not loans:
            return Nobody()
        ids = in_order(self.num_experts, peers.size).experts_of(peers.rank).tolist()
        return KeepGuests()(Lending.of(loans, ids, peers))


def _choice(rows: Rows, score_TK: Tensor, num_experts: int) -> Choice:
    unknown_TE = score_TK.new_zeros(1, 1).expand(len(score_TK), num_experts)
    return Choice(
        token_N=rows.token_N,
        expert_N=rows.expert_N,
        wanted_N=rows.expert_N,
        weight_N=score_TK.reshape(-1),
        score_TE=unknown_TE,
        logit_TE=unknown_TE,
        price_E=unknown_TE.new_zeros(num_experts),
        valid_T=None,
        length=len(score_TK),
        top_k=rows.top_k,
        k=score_TK.shape[1],
    )
