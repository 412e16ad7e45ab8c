"""EvenDispatcher: evenmoe's dispatch behind the six calls of Megatron's MoETokenDispatcher.

    dispatch_preprocess  the tables of the router as rows; no communication
    token_dispatch       counts to all ranks, assign, rows to the ranks that compute them
    dispatch_postprocess rows, sorted by expert, and how many for each
    combine_preprocess   nothing to do
    token_combine        results home, weighted and summed
    combine_postprocess  the shape of the input

Results are weighted at home, so the experts are given ones as probabilities. With visitors, the experts must be
VisitedExperts: rows come for the own experts first, then for those that visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from moe.comm import Lending, Peers, exchange, gather_counts, unseen, visitors
from moe.dispatch import Dispatch
from moe.integrations.megatron.core import in_order
from moe.integrations.megatron.router import Prices
from moe.integrations.megatron.versions import taken_by
from moe.recompute import Replays
from routing import Assigner, Assignment, AtHome, Choice, Loan, Rows, Unpriced, at_least_fp32


class _Step(NamedTuple):
    """What a recomputation must not decide again."""

    rows: Rows
    assignment: Assignment
    loans: tuple[Loan, ...]
    dispatch: Dispatch


class EvenDispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """assigner: which rank computes how many rows of which expert. assignment: of the last call, for whoever looks."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: Sequence[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        assigner: Assigner = AtHome(),
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if self.tp_size > 1:
            raise ValueError(f"experts are split over {self.tp_size} tensor-parallel ranks; use 1")
        self.own, self.assigner = tuple(local_expert_indices), assigner
        self.peers = Peers.of(pg_collection.ep)
        self.placement = in_order(num_local_experts * self.peers.size, self.peers.size)
        self.assignment: Assignment | None = None
        self.loans: tuple[Loan, ...] = ()
        self.reader = Prices(config, Unpriced(), "cpu")
        self._replays: Replays[_Step] = Replays()

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._shape, self._replayed = tokens.shape, self._replays.find()
        rows = None if self._replayed is None else self._replayed.rows
        self._choice: Choice = self.reader.told_by_map(probs, routing_map, rows)
        return tokens.reshape(-1, tokens.shape[-1]), self._choice.weight_N

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        step = self._decide() if self._replayed is None else self._replayed
        self._replays.keep(step)
        self.assignment, self.loans, self._dispatch = step.assignment, step.loans, step.dispatch
        return _out(hidden_states, step.dispatch), probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._weight_N = probs
        return hidden_states, torch.tensor(self._dispatch.rows_A), hidden_states.new_ones(len(hidden_states))

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _home(hidden_states, self._weight_N, self._dispatch)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.view(self._shape)

    def _decide(self) -> _Step:
        choice = self._choice
        with unseen():  # a replay will not run it again
            assignment = self.assigner(gather_counts(choice.load_E, self.peers), self.placement)
            loans = assignment.loans(self.placement)
            active = [*self.own, *visitors(loans, self.peers.rank)]
            dispatch = Dispatch.of(choice, assignment, active, self.peers)
        rows = Rows(choice.token_N, choice.expert_N, choice.top_k, choice.wanted_N)
        return _Step(rows, assignment, loans, dispatch)


class VisitedExperts(SequentialMLP):  # type: ignore[misc]
    """Megatron's SequentialMLP, whose experts may visit other ranks for a step. Gradients come home.

    While anybody visits, a step copies this rank's weights once; without visits it is SequentialMLP.
    """

    dispatcher: EvenDispatcher | None = None

    def __init__(self, num_local_experts: int, config: TransformerConfig, submodules: Any, **more: Any) -> None:
        if config.gradient_accumulation_fusion:
            raise ValueError("gradient_accumulation_fusion writes past visitors; use False, or CoreMoELayer")
        super().__init__(num_local_experts, config, submodules, **taken_by(SequentialMLP, more))

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        if self.dispatcher is None or not self.dispatcher.loans:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)  # type: ignore[no-any-return]
        own, visiting = self._weights(self.dispatcher)
        rows_A = tokens_per_expert.tolist()
        parts = zip(torch.split(permuted_local_hidden_states, rows_A), torch.split(permuted_probs, rows_A))
        # Every own expert is called with what `_Lend` returned, rows or none: in backward all ranks must return loans.
        outs = [functional_call(self.local_experts[0], weight, part)[0] for weight, part in zip(own + visiting, parts)]
        return torch.cat(outs), None

    def _weights(self, dispatcher: EvenDispatcher) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """Of each own expert, then of each visitor, by the names of its module's parameters."""
        names = [name for name, _ in self.local_experts[0].named_parameters()]
        stacks = [torch.stack([expert.get_parameter(name) for expert in self.local_experts]) for name in names]
        ids = dispatcher.placement.experts_of(dispatcher.peers.rank).tolist()
        lending = Lending.of(dispatcher.loans, ids, dispatcher.peers)
        all_of: tuple[Tensor, ...] = _Lend.apply(lending, *stacks)  # type: ignore[no-untyped-call]
        both = all_of[: len(stacks)], all_of[len(stacks) :]
        own, visiting = ([dict(zip(names, each)) for each in zip(*(s.unbind(0) for s in stacks))] for stacks in both)
        return own, visiting


class _Lend(torch.autograd.Function):
    """forward:   own = W;  visiting_i = W of the rank that lends i
    backward:  dW_e = down_e + sum over the borrowers of e of dvisiting_e
    """

    @staticmethod
    def forward(ctx: Any, lending: Lending, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.lending = lending
        return (*(weight.view_as(weight) for weight in weights), *lending.fetch(weights).wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lending: Lending = ctx.lending
        own, visiting = grads[: len(grads) // 2], grads[len(grads) // 2 :]
        came = lending.give_back(visiting).wait()
        total = [grad.clone() for grad in own]
        for grad, more in zip(total, came, strict=True):
            lending.add(grad, more)
        return None, *total


def _out(x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """Every token to its experts. -> row_MD, sorted by expert"""
    leaving_GD = x_TD.index_select(0, dispatch.token_N[dispatch.row_G])
    guest_HD = exchange(leaving_GD, dispatch.send_R, dispatch.recv_R, dispatch.peers)
    row_MD = x_TD.new_zeros(dispatch.num_rows, x_TD.shape[1])
    row_MD = row_MD.index_copy(0, dispatch.place_O, x_TD.index_select(0, dispatch.token_N[dispatch.row_O]))
    return row_MD.index_copy(0, dispatch.place_H, guest_HD)


def _home(out_MD: Tensor, weight_N: Tensor, dispatch: Dispatch) -> Tensor:
    """Every result to its token, weighted and summed in fp32 or better. -> y_TD"""
    assert dispatch.top_k is not None
    guest_HD = out_MD.index_select(0, dispatch.place_H)
    home_GD = exchange(guest_HD, dispatch.recv_R, dispatch.send_R, dispatch.peers)
    row_ND = out_MD.new_zeros(len(dispatch.token_N), out_MD.shape[1])
    row_ND = row_ND.index_copy(0, dispatch.row_O, out_MD.index_select(0, dispatch.place_O))
    row_ND = row_ND.index_copy(0, dispatch.row_G, home_GD).to(at_least_fp32(out_MD.dtype))
    weighted_ND = row_ND * weight_N[:, None]
    return weighted_ND.view(dispatch.num_tokens, dispatch.top_k, -1).sum(dim=1).to(out_MD.dtype)
