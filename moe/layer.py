"""MoE: the drop-in layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from moe.comm import Group, Peers, gather_counts, lend, tie, visitors
from moe.config import MoEConfig
from moe.dispatch import Dispatch
from moe.experts import Experts, Shared, Stack, compute_dtype
from moe.recompute import Replays
from placement import Placement, RoundRobin, Topology
from routing import Assignment, Choice, Loan, Router, Rows

Observer = Callable[[Choice, Assignment], object]


class _Step(NamedTuple):
    """Everything decided for one call: all that a recomputation must not decide again."""

    rows: Rows
    assignment: Assignment
    loans: tuple[Loan, ...]
    dispatch: Dispatch
    grad_wanted: bool | None


class MoE(nn.Module):
    """A mixture of experts whose experts live on the ranks of `group`. [..., dim] -> [..., dim]

    Outputs, and the gradients of every parameter and input, are those of one process with all experts, where the loss
    is the sum over the ranks. Replicated parameters (router, shared expert) get this rank's share of their gradient, to
    be summed by whoever owns data parallelism; experts get theirs whole.

    group: a process group, a one-dimensional DeviceMesh, or None for this process alone. placement: where the experts
    live, None for round robin. All ranks must build the layer alike and call it together, with tokens or without.
    """

    def __init__(
        self,
        config: MoEConfig,
        group: Group = None,
        placement: Placement | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.peers = Peers.of(group)
        self.placement = _placement(config, self.peers, placement)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = Router(
            config.dim,
            config.num_experts,
            config.top_k,
            score=config.score,
            select=config.select,
            weigh=config.weigh,
            balancer=config.balancer,
            **factory,
        )
        self.experts = Experts(
            config.dim,
            config.hidden,
            self.placement.experts_of(self.peers.rank).tolist(),
            activation=config.activation,
            bias=config.bias,
            compute=config.compute,
            **factory,
        )
        shared = (config.dim, config.shared_hidden)
        self.shared = (
            Shared(*shared, activation=config.activation, bias=config.bias, **factory) if config.shared_hidden else None
        )
        self._observers: OrderedDict[int, Observer] = OrderedDict()
        self._replays: Replays[_Step] = Replays()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """valid: [...], False for padding, which is neither routed nor counted and gets zero."""
        step = self._replays.find()
        if step is None:
            x_TD, valid_T, choice, step = self._decide(x, valid)
        else:
            x_TD, valid_T = _flat(x, valid)
            choice = self.router(x_TD, valid_T, step.rows)
        self._replays.keep(step)

        own, visiting = self._weights(step.loans)
        row_MD = step.dispatch.send(_joining_in(x_TD, step.grad_wanted).to(compute_dtype(x_TD)))
        out_MD = self.experts(row_MD, step.dispatch.rows_A, own, visiting)
        y_TD = step.dispatch.home(out_MD, choice.weight_N)
        if self.shared is not None:
            y_TD = y_TD + self._shared(self.shared, x_TD, valid_T)
        return y_TD.view(x.shape)

    def observe(self, fn: Observer) -> RemovableHandle:
        """Call fn(choice, assignment) on every forward from now on, recomputations excepted, until handle.remove().

        It is called between collectives: if it raises on one rank only, the others wait for it.
        """
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = fn
        return handle

    def expert_state(self) -> dict[int, dict[str, Tensor]]:
        """{expert: {name: tensor}} of the experts this rank homes, sharing memory with the parameters."""
        return {
            expert: {name: weight.detach()[slot] for name, weight in self.experts.named_parameters()}
            for slot, expert in enumerate(self.experts.expert_ids)
            if self.placement.home_E[expert] == self.peers.rank
        }

    @torch.no_grad()
    def load_expert_state(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """From any such dict that holds this rank's experts, wherever they lived when it was saved. All, or nothing."""
        copies: list[tuple[Tensor, Tensor]] = []
        for name, weight in self.experts.named_parameters():
            for slot, expert in enumerate(self.experts.expert_ids):
                if name not in state.get(expert, {}):
                    raise ValueError(f"the state has no {name!r} of expert {expert}, which lives on this rank")
                if (shape := state[expert][name].shape) != weight.shape[1:]:
                    raise ValueError(
                        f"{name!r} of expert {expert} has shape {list(shape)}; the layer has {list(weight.shape[1:])}"
                    )
                copies.append((weight[slot], state[expert][name]))
        for target, source in copies:
            target.copy_(source)

    def extra_repr(self) -> str:
        return f"rank {self.peers.rank} of {self.peers.size}, {self.config.assigner}"

    def _decide(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None, Choice, _Step]:
        """Choose, tell every rank, assign. The counts are gathered even if this rank's input is no good, so that all
        ranks raise the same error instead of waiting for one that has left."""
        problem = self._problem(x, valid)
        choice = None
        if problem is None:
            x_TD, valid_T = _flat(x, valid)
            choice = self.router(x_TD, valid_T)
        with _disable_current_modes():  # selective checkpointing must not save what a replay will not run again
            table = gather_counts(self._header(choice, x.requires_grad), self.peers)
            _raise_alike(table[:, self.config.num_experts :], problem, self.peers.rank)
            assert choice is not None
            assignment = self.config.assigner(table[:, : self.config.num_experts].copy(), self.placement)
            loans = assignment.loans(self.placement)
            active = [*self.experts.expert_ids, *visitors(loans, self.peers.rank)]
            dispatch = Dispatch.of(choice, assignment, active, self.peers)
        step = _Step(
            rows=Rows(choice.token_N, choice.expert_N, choice.top_k),
            assignment=assignment,
            loans=loans,
            dispatch=dispatch,
            grad_wanted=bool(table[:, -1].any()) if torch.is_grad_enabled() else None,
        )
        for fn in tuple(self._observers.values()):
            fn(choice, assignment)
        return x_TD, valid_T, choice, step

    def _header(self, choice: Choice | None, grad_wanted: bool) -> Tensor:
        """What every rank must know: rows for each expert; then tokens with bad logits, no choice made, grad wanted."""
        num_experts = self.config.num_experts
        header = torch.zeros(num_experts + 3, dtype=torch.int64, device=self.router.weight.device)
        if choice is None:
            header[num_experts + 1] = 1
        else:
            header[:num_experts] = choice.load_E
            header[num_experts] = _count_nonfinite(choice)
        header[num_experts + 2] = int(grad_wanted)
        return header

    def _shared(self, shared: nn.Module, x_TD: Tensor, valid_T: Tensor | None) -> Tensor:
        """Padding is masked on both sides: what it holds must reach neither the output nor a weight's gradient."""
        if valid_T is None:
            return shared(x_TD)  # type: ignore[no-any-return]
        real_T1 = valid_T[:, None]
        return shared(x_TD.where(real_T1, 0.0)).where(real_T1, 0.0)  # type: ignore[no-any-return]

    def _weights(self, loans: tuple[Loan, ...]) -> tuple[Stack, Stack]:
        stack = self.experts.stack()
        names = [name for name, weight in zip(Stack._fields, stack) if weight is not None]
        weights = tie([weight for weight in stack if weight is not None], self.placement, self.peers)
        own, visiting = lend(weights, loans, self.placement, self.peers)
        empty: dict[str, Tensor | None] = {"up_bias": None, "down_bias": None}
        return Stack(**(empty | dict(zip(names, own)))), Stack(**(empty | dict(zip(names, visiting))))  # type: ignore[arg-type]

    def _problem(self, x: Tensor, valid: Tensor | None) -> str | None:
        weight = self.experts.up
        if x.ndim < 1 or x.shape[-1] != self.config.dim:
            return f"the layer takes [..., {self.config.dim}]; got {list(x.shape)}"
        if x.device != weight.device:
            return f"the input is on {x.device}, the layer on {weight.device}"
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"the input is {x.dtype}, the layer {weight.dtype}; convert one, or use torch.autocast"
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:-1]):
            return f"valid must be bool and {list(x.shape[:-1])}; got {valid.dtype} and {list(valid.shape)}"
        return None


def _placement(config: MoEConfig, peers: Peers, placement: Placement | None) -> Placement:
    if placement is None:
        topology = Topology.fitting(num_experts=config.num_experts, ranks=peers.size, ranks_per_node=peers.size)
        return RoundRobin().place(config.num_experts, topology)
    if (placement.ranks, placement.num_experts) != (peers.size, config.num_experts):
        raise ValueError(
            f"the placement puts {placement.num_experts} experts on {placement.ranks} ranks; the layer has "
            f"{config.num_experts} experts on {peers.size} ranks"
        )
    return placement


def _flat(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x.reshape(-1, x.shape[-1]), None if valid is None else valid.reshape(-1)


def _joining_in(x_TD: Tensor, grad_wanted: bool | None) -> Tensor:
    """If any rank's input wants a gradient, all ranks take part in the exchange that brings it; None: nobody knows."""
    if torch.is_grad_enabled() and not x_TD.requires_grad and grad_wanted is not False:
        return x_TD.detach().requires_grad_()
    return x_TD


def _count_nonfinite(choice: Choice) -> Tensor:
    bad_T = ~choice.logit_TE.detach().isfinite().all(dim=-1)
    return (bad_T if choice.valid_T is None else bad_T & choice.valid_T).sum()


def _raise_alike(flag_RF: NDArray[np.int64], problem: str | None, rank: int) -> None:
    """flag_RF: tokens with non-finite logits and refused inputs, by rank."""
    if (refused := np.flatnonzero(flag_RF[:, 1])).size:
        ranks = ", ".join(map(str, refused.tolist()))
        raise ValueError(f"bad input on rank {ranks}: {problem or f'all ranks stop with it (this is rank {rank})'}")
    if (bad := np.flatnonzero(flag_RF[:, 0])).size:
        raise ValueError(
            f"NaN or Inf in the router's logits: {flag_RF[bad, 0].tolist()} tokens on ranks {bad.tolist()}; "
            f"look for it in the layer's input and in router.weight"
        )
