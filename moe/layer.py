"""MoE: the drop-in layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe.batch import Batch, header, manner, problem_of, raise_alike, raise_if_unlike
from moe.broadcast import keep_from_broadcast
from moe.census import Pool
from moe.comm import Group, Lending, Peers, gather_counts, tie, unseen, visitors
from moe.config import MoEConfig
from moe.dispatch import Dispatch, upload
from moe.experts import Experts, Shared, compute_dtype
from moe.guestbook import Guestbook
from moe.guests import Guests, Nobody
from moe.levy import Levies, Slip
from moe.recompute import Replays
from moe.stack import Stack
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
    pool_E: Tensor | None
    slip: Slip | None


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
            drop=config.drop,
            jitter=config.jitter,
            layer=config.layer,
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
        self.pool = Pool(config.num_experts, device)
        self.levies = Levies(config.losses)
        self.guestbook: Guestbook | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, valid: Tensor | None = None, ratio: Tensor | None = None) -> Tensor:
        """valid: [...], False for padding, which is neither routed nor counted and gets zero. ratio: [..., without the
        last two of x], the masked share of each sequence, for selectors that ask for it."""
        step = self._replays.find()
        if step is None:
            batch, choice, step = self._decide(x, valid, ratio)
        else:
            batch = Batch.of(x, valid, ratio)
            choice = self._route(batch, step.rows)
        self._replays.keep(step)

        x_TD = _joining_in(batch.x_TD, step.grad_wanted)
        guests = self._guests(step.loans, compute_dtype(x_TD))
        y_TD: Tensor = self.experts(x_TD, choice.weight_N, step.dispatch, self._weights(), guests)
        if self.shared is not None:
            y_TD = y_TD + self._shared(self.shared, batch.x_TD, batch.valid_T)
        if step.slip is not None:
            y_TD = self.levies(y_TD, choice, step.pool_E, step.slip)
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
        self.experts.check_whole()
        return {
            expert: {name: weight.detach()[slot] for name, weight in self.experts.named_parameters()}
            for slot, expert in enumerate(self.experts.expert_ids)
            if self.placement.home_E[expert] == self.peers.rank
        }

    @torch.no_grad()
    def load_expert_state(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """From any such dict that holds this rank's experts, wherever they lived when it was saved. All, or nothing."""
        self.experts.check_whole()
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

    def rehome(self, placement: Placement, weights: Mapping[str, Tensor]) -> None:
        """Other experts, or another order of them, from the next step on: all of it, or an error and none.

        placement: on the same ranks. weights: the new stack of each parameter. Every rank must call; see move_experts,
        which brings the weights and takes care of the optimiser.
        """
        _placement(self.config, self.peers, placement)
        if self.guestbook is not None:
            self.guestbook.clear()
        self.experts.rehouse(placement.experts_of(self.peers.rank).tolist(), weights)
        self.placement = placement

    def resettle(self, placement: Placement, peers: Peers) -> None:
        """Another placement among other peers from the next step on. The weights stay: experts that the placement does
        not put here get no rows. Every rank must call; see Live."""
        _placement(self.config, peers, placement)
        if missing := set(placement.experts_of(peers.rank).tolist()) - set(self.experts.expert_ids):
            raise ValueError(f"the placement puts experts {sorted(missing)} on this rank, which does not hold them")
        if self.guestbook is not None:
            raise ValueError("guests stay inside lasting_visits(model); leave it before ranks change")
        self.placement, self.peers = placement, peers

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """A DeepSpeed engine calls it while it is made. It would take experts for parameters that all ranks share."""
        raise ValueError(
            "DeepSpeed does not know that these experts differ from rank to rank, and would average them; in the place "
            "of deepspeed.initialize use moe.integrations.deepspeed.initialize, with the same arguments"
        )

    def extra_repr(self) -> str:
        return f"rank {self.peers.rank} of {self.peers.size}, {self.config.assigner}"

    def _decide(self, x: Tensor, valid: Tensor | None, ratio: Tensor | None) -> tuple[Batch, Choice, _Step]:
        """Choose, tell every rank, assign. The counts are gathered even if this rank cannot choose, so that all ranks
        raise instead of waiting for one that has left."""
        problem: str | Exception | None = problem_of(x, valid, ratio, self.config.dim, self.experts.stack().up)
        if problem is None and self.guestbook is not None:
            problem = self.guestbook.problem(self.experts.stack())
        choice = None
        if problem is None:
            batch = Batch.of(x, valid, ratio)
            try:
                choice = self._route(batch)
            except Exception as error:  # of a selector, say; this rank stops with it once all have been told
                problem = error
        with unseen():  # a replay will not run it again
            told = manner(self.experts.parameters(), self.router, compute_dtype(x))
            table = gather_counts(header(choice, ratio, x.requires_grad, self.router.price_E, told), self.peers)
            grad_wanted = bool(table[:, -1].any())
            try:
                raise_alike(table[:, self.config.num_experts :], problem, self.peers.rank)
            finally:
                del problem
            assert choice is not None
            assignment = self.config.assigner(table[:, : self.config.num_experts].copy(), self.placement)
            loans = assignment.loans(self.placement)
            moving = bool(loans) or self.placement.slots > self.placement.num_experts
            raise_if_unlike(table[:, -2], moving=moving, grad_wanted=grad_wanted)
            active = [*self.experts.expert_ids, *visitors(loans, self.peers.rank)]
            dispatch = Dispatch.of(choice, assignment, active, self.peers)
            pool_E, slip = self._observe(choice, assignment)
        step = _Step(
            rows=Rows(choice.token_N, choice.expert_N, choice.top_k, choice.wanted_N),
            assignment=assignment,
            loans=loans,
            dispatch=dispatch,
            grad_wanted=grad_wanted if torch.is_grad_enabled() else None,
            pool_E=pool_E,
            slip=slip,
        )
        return batch, choice, step

    def _observe(self, choice: Choice, assignment: Assignment) -> tuple[Tensor | None, Slip | None]:
        """Tell whoever wants to know of a choice: in training the router's statistics and the losses, always those who
        asked. A census only counts. -> what the losses need"""
        keep_from_broadcast(self.peers)
        pool_E, slip = None, None
        if self.pool.counting or (self.training and self.levies.pooled):
            group_E = upload([assignment.count_RE.sum(axis=0)], choice.expert_N.device)[0]
            pool_E = self.pool.take(choice.load_E, group_E)
        if self.pool.counting:
            return pool_E, slip
        if self.training:
            self.router.observe(choice)
            slip = self.levies.open_slip(choice)
        for fn in tuple(self._observers.values()):
            fn(choice, assignment)
        return pool_E, slip

    def _route(self, batch: Batch, rows: Rows | None = None) -> Choice:
        choice: Choice = self.router(batch.x_TD, batch.valid_T, rows, length=batch.length, ratio_B=batch.ratio_B)
        return choice

    def _shared(self, shared: nn.Module, x_TD: Tensor, valid_T: Tensor | None) -> Tensor:
        """Padding is masked on both sides: what it holds must reach neither the output nor a weight's gradient."""
        if valid_T is None:
            return shared(x_TD)  # type: ignore[no-any-return]
        real_T1 = valid_T[:, None]
        return shared(x_TD.where(real_T1, 0.0)).where(real_T1, 0.0)  # type: ignore[no-any-return]

    def _weights(self) -> Stack:
        """The experts at home, of which copies elsewhere share their gradients."""
        stack = self.experts.stack()
        names = [name for name, weight in zip(Stack._fields, stack) if weight is not None]
        ids = self.experts.expert_ids
        weights = tie([weight for weight in stack if weight is not None], ids, self.placement, self.peers)
        empty: dict[str, Tensor | None] = {"up_bias": None, "down_bias": None}
        return Stack(**(empty | dict(zip(names, weights))))  # type: ignore[arg-type]

    def _guests(self, loans: tuple[Loan, ...], dtype: torch.dtype) -> Guests:
        if not loans:
            return Nobody()
        if self.guestbook is not None:
            return self.guestbook.admit(loans, self.experts.expert_ids, dtype)
        return self.config.guests(Lending.of(loans, self.experts.expert_ids, self.peers))


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


def _joining_in(x_TD: Tensor, grad_wanted: bool | None) -> Tensor:
    """If any rank's input wants a gradient, all ranks take part in the exchange that brings it; None: nobody knows."""
    if torch.is_grad_enabled() and not x_TD.requires_grad and grad_wanted is not False:
        return x_TD.detach().requires_grad_()
    return x_TD
