"""Planned: the layer whose every decision is made on the device, with shapes that no decision changes.

The counts of all ranks are gathered on the device, LeastLoadedOnDevice decides there, and rows, visiting experts and
results travel in messages of fixed, equal sizes. The host waits for nothing, forward or backward, so that a step can be
captured as a CUDA graph. The price is room: see Capacity. No GPU has run it yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moe.batch import Batch, bad_of, manner, problem_of, raise_if_unlike
from moe.broadcast import keep_from_broadcast
from moe.comm import Group, Peers, gather_counts, gather_table, unseen
from moe.compute import Fused, Grouped
from moe.config import MoEConfig
from moe.experts import compute_dtype
from moe.fixed import Fixed, Homes, Room
from moe.fused import Plan, combined, moved, through
from moe.layer import MoE, Observer
from moe.recompute import Replays
from moe.stack import Stack
from moe.swap import guard, swap, visit_all
from placement import Placement
from routing import NOWHERE, Choice, LeastLoadedOnDevice, Rows, at_least_fp32, outside_autocast


class CapacityError(RuntimeError):
    """Rows did not fit the room they were given, or were chosen by logits that are no numbers."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Room for messages. Room at the experts needs no setting: the plan's bound, ceil(headroom * rows / ranks) + chunk.

    pair: rows that one rank can send another, as a multiple of the mean, its rows / ranks. None: all it has, so that
    nothing ever overflows; its messages are then `ranks` times its rows. visits: experts that one rank can lend another
    at once; None: all it has.
    """

    pair: float | None = None
    visits: int | None = None

    def __post_init__(self) -> None:
        if self.pair is not None and not self.pair > 0:
            raise ValueError(f"pair={self.pair}; it is a multiple of the mean: use pair > 0, or None for all rows")
        if self.visits is not None and self.visits < 0:
            raise ValueError(f"visits={self.visits}; use 0 or more, or None for all experts of a rank")

    def room(self, num_rows: int, plan: LeastLoadedOnDevice, placement: Placement, rank: int) -> Room:
        ranks, own = placement.ranks, len(placement.homed_R[rank])
        rows = min(math.ceil(plan.headroom * num_rows) + plan.min_chunk, ranks * num_rows)
        pair = num_rows if self.pair is None else min(math.ceil(self.pair * num_rows / ranks), num_rows)
        most = max(len(homed) for homed in placement.homed_R)
        visits = 0 if ranks == 1 else most if self.visits is None else min(self.visits, most)
        return Room(pair=pair, rows=min(rows, ranks * pair), visits=visits, own=own)


class _Step(NamedTuple):
    rows: Rows
    fixed: Fixed


class Planned(MoE):
    """MoE, decided on the device. Parameters, their names and the results are MoE's.

    plan: by which experts visit; every visit must be free to it, else no capacity could be promised. All ranks call
    with as many tokens as in the first call, in which the host waits once to see that they do. If something does not
    fit, every output and gradient of the step is NaN on every rank, and `check`, where the host waits, says so.
    """

    trouble_F: Tensor

    def __init__(
        self,
        config: MoEConfig,
        group: Group = None,
        placement: Placement | None = None,
        *,
        plan: LeastLoadedOnDevice = LeastLoadedOnDevice(),
        capacity: Capacity = Capacity(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, group, placement, device=device, dtype=dtype)
        if plan.worth.rows:
            raise ValueError(f"a plan that weighs visits ({plan.worth}) may keep all rows at home; use BreakEven()")
        _refuse_copies(self.placement)
        if config.losses:
            raise ValueError(f"Planned charges no losses; got {config.losses}: use prices (balancer=...), or MoE")
        self.plan, self.capacity, self.num_tokens = plan, capacity, 0
        self.register_buffer("trouble_F", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        self._homes: tuple[Placement, Homes] | None = None
        self._steps: Replays[_Step] = Replays()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, valid: Tensor | None = None, ratio: Tensor | None = None) -> Tensor:
        """As MoE.forward. Arguments that are wrong raise on the rank that was given them."""
        if (problem := problem_of(x, valid, ratio, self.config.dim, self.experts.stack().up)) is not None:
            raise ValueError(problem)
        if self.pool.counting:
            raise ValueError("Planned takes no part in a census, which counts on the host; use MoE")
        batch, step = Batch.of(x, valid, ratio), self._steps.find()
        choice = self._route(batch, None if step is None else step.rows)
        if step is None:
            with unseen():  # a replay will not run it again
                step = self._planned(choice, manner(self.experts.parameters(), self.router, compute_dtype(batch.x_TD)))
        self._steps.keep(step)
        x_TD = batch.x_TD
        if torch.is_grad_enabled() and not x_TD.requires_grad:
            x_TD = x_TD.detach().requires_grad_()  # every rank takes part in the exchange of its gradient
        y_TD = self._compute(x_TD, choice, step.fixed).to(compute_dtype(x_TD))
        if self.shared is not None:
            y_TD = y_TD + self._shared(self.shared, batch.x_TD, batch.valid_T)
        return y_TD.view(x.shape)

    def check(self) -> None:
        """The host waits; CapacityError if a step since the last check was in trouble. On all ranks alike."""
        over, bad = self.trouble_F.tolist()
        self.trouble_F.zero_()
        if bad:
            raise CapacityError(f"NaN or Inf in the router's logits or prices of {bad} tokens since the last check")
        if over:
            raise CapacityError(
                f"{over} steps since the last check did not fit {self.capacity}, and gave NaN; give it more room, or "
                f"Capacity(), which nothing overflows"
            )

    def observe(self, fn: Observer) -> RemovableHandle:
        raise ValueError("an observer is told an Assignment, which Planned never brings to the host; use MoE")

    def resettle(self, placement: Placement, peers: Peers) -> None:
        raise ValueError("the peers of a Planned layer stay, for its messages have fixed sizes; use MoE")

    @torch.no_grad()
    def _planned(self, choice: Choice, own: int) -> _Step:
        if choice.top_k is None:
            raise ValueError(f"Planned takes a top-k choice; {self.config.select} makes another: use MoE")
        self._open(choice, own)
        device, num_experts = choice.expert_N.device, self.config.num_experts
        if self._homes is None or self._homes[0] is not self.placement or self._homes[1].home_E.device != device:
            _refuse_copies(self.placement)
            self._homes = self.placement, Homes.of(self.placement, device)
        homes = self._homes[1]
        table = gather_table(torch.cat([choice.load_E, bad_of(choice, self.router.price_E)[None]]), self.peers)
        count_RE, bad = table[:, :num_experts], table[:, num_experts].sum()
        room = self.capacity.room(choice.num_tokens * choice.top_k, self.plan, self.placement, self.peers.rank)
        quota_RE = self.plan(count_RE, homes.home_E)
        fixed = Fixed.of(choice, count_RE, quota_RE, homes, room, self.peers.rank)
        self.trouble_F += torch.stack([fixed.over.long(), bad])
        keep_from_broadcast(self.peers)
        if self.training:
            self.router.observe(_if_sound(choice, bad == 0))
        return _Step(Rows(choice.token_N, choice.expert_N, choice.top_k, choice.wanted_N), fixed)

    def _open(self, choice: Choice, own: int) -> None:
        """The first call: have all ranks as many tokens, and one manner? own: this rank's. From then on both stand."""
        if not self.num_tokens:
            told = torch.tensor([choice.num_tokens, own], device=choice.expert_N.device)
            tokens_R, manner_R = gather_counts(told, self.peers).T
            if len(set(tokens_R.tolist())) > 1 or not tokens_R[0]:
                raise ValueError(
                    f"Planned needs equally many tokens on every rank, at least 1; got {tokens_R.tolist()}"
                )
            raise_if_unlike(manner_R, moving=self.capacity.visits != 0, grad_wanted=True)
            self.num_tokens = choice.num_tokens
        if choice.num_tokens != self.num_tokens:
            raise ValueError(f"{choice.num_tokens} tokens; this layer was first called with {self.num_tokens}: pad")

    def _compute(self, x_TD: Tensor, choice: Choice, fixed: Fixed) -> Tensor:
        dtype, peers = compute_dtype(x_TD), self.peers
        with outside_autocast(x_TD):
            x_TD = x_TD.to(dtype)
            if isinstance(self.experts.compute, Fused) and self.experts.compute.takes(self._cast(dtype)):
                return self._in_kernels(x_TD, choice, fixed)
            if peers.group is None:
                row_MD = x_TD.index_select(0, fixed.token_X[fixed.index_M])
            else:
                row_MD = swap(x_TD.index_select(0, fixed.token_X), peers).index_select(0, fixed.index_M)
            stack = self._active_stack(fixed, dtype)
            result_MD = self._through(row_MD.where(fixed.live_M[:, None], 0.0), stack, fixed)
            home_XD = result_MD.index_select(0, fixed.home_X)
            home_XD = home_XD if peers.group is None else swap(home_XD, peers)
            return _total(home_XD, choice, fixed)

    def _in_kernels(self, x_TD: Tensor, choice: Choice, fixed: Fixed) -> Tensor:
        """The same through the kernels of Fused, which gather as they multiply, and leave out what is no row."""
        stack, peers = self._active_stack(fixed, x_TD.dtype), self.peers
        line_M = torch.arange(len(fixed.index_M), device=x_TD.device)
        home_X = torch.full_like(fixed.home_X, -1).scatter_(0, fixed.index_M, line_M.where(fixed.live_M, -1))
        place_TK = fixed.place_N.where(fixed.fits_N, -1).view(choice.num_tokens, -1)
        weight_TK = _doomed(choice, fixed, torch.float32).view(place_TK.shape)
        if peers.group is None:
            place_TK = home_X[place_TK.clamp(min=0)].where(place_TK >= 0, -1)
            plan = Plan(fixed.token_X[fixed.index_M], place_TK, fixed.row_A, fixed.end_A, self.config.activation)
            return combined(through(x_TD, stack, plan), place_TK, weight_TK)
        came_XD = swap(moved(x_TD, fixed.token_X, place_TK), peers)
        plan = Plan(fixed.index_M, home_X[:, None], fixed.row_A, fixed.end_A, self.config.activation)
        back_M1 = fixed.index_M.where(fixed.live_M, -1)[:, None]
        home_XD = swap(moved(through(came_XD, stack, plan), home_X, back_M1), peers)
        return combined(home_XD, place_TK, weight_TK)

    def _active_stack(self, fixed: Fixed, dtype: torch.dtype) -> Stack:
        """The experts at home, then the visitors. Who gets no row has no gradient here, whatever a kernel says."""
        some = list(self._cast(dtype))
        if len(fixed.pick_W):
            some = [None if own is None else torch.cat([own, visit_all(own, fixed.pick_W, self.peers)]) for own in some]
        busy_A = fixed.row_A > 0
        return Stack(*(None if weight is None else guard(weight, busy_A) for weight in some))  # type: ignore[arg-type]

    def _cast(self, dtype: torch.dtype) -> Stack:
        return Stack(*(None if weight is None else weight.to(dtype) for weight in self.experts.stack()))  # type: ignore[arg-type]

    def _through(self, row_MD: Tensor, stack: Stack, fixed: Fixed) -> Tensor:
        h_MF = _times(row_MD, stack, stack.up, stack.up_bias, fixed)
        live_M1 = fixed.live_M[:, None]
        a_MF = self.config.activation(h_MF.where(live_M1, 0.0))
        return _times(a_MF, stack, stack.down, stack.down_bias, fixed).where(live_M1, 0.0)


def _refuse_copies(placement: Placement) -> None:
    if placement.slots != placement.num_experts or not all(placement.homed_R):
        raise ValueError("Planned takes one copy of each expert, and an expert or more on each rank; use MoE")


def _if_sound(choice: Choice, sound: Tensor) -> Choice:
    """The choice, or if not sound one of padding alone: a NaN would stay in the prices for ever, and has no place in a
    histogram."""
    expert_N, wanted_N = choice.expert_N.where(sound, NOWHERE), choice.wanted_N.where(sound, NOWHERE)
    valid_T = sound.expand(choice.num_tokens) if choice.valid_T is None else choice.valid_T & sound
    score_TE, price_E = choice.score_TE.detach().where(sound, 0.0), choice.price_E.where(sound, 0.0)
    return replace(choice, expert_N=expert_N, wanted_N=wanted_N, score_TE=score_TE, price_E=price_E, valid_T=valid_T)


def _times(row_MD: Tensor, stack: Stack, weight: Tensor, bias: Tensor | None, fixed: Fixed) -> Tensor:
    """row_m weight_e^T + bias_e; anything where there is no row. Types that torch's grouped matmul does not take go
    through each expert, all rows of them: right, and slow."""
    if Grouped().takes(stack):
        got_MF = F.grouped_mm(row_MD, weight.transpose(1, 2), offs=fixed.end_A)
    else:
        got_MF = row_MD.new_zeros(len(row_MD), weight.shape[1])
        for expert, own in enumerate(weight.unbind(0)):
            got_MF = torch.where((fixed.slot_M == expert)[:, None], row_MD @ own.t(), got_MF)
    return got_MF if bias is None else got_MF + bias.index_select(0, fixed.slot_M)


def _total(home_XD: Tensor, choice: Choice, fixed: Fixed) -> Tensor:
    """The weighted rows of each token, added in fp32 or better in the order they were chosen."""
    assert choice.top_k is not None
    dtype = at_least_fp32(home_XD.dtype)
    weight_TK = _doomed(choice, fixed, dtype).view(-1, choice.top_k)
    place_TK, fits_TK = fixed.place_N.view(-1, choice.top_k), fixed.fits_N.view(-1, choice.top_k)
    y_TD: Tensor | int = 0
    for place_T, fits_T, weight_T in zip(place_TK.unbind(1), fits_TK.unbind(1), weight_TK.unbind(1), strict=True):
        row_TD = home_XD.index_select(0, place_T).where(fits_T[:, None], 0.0)
        y_TD = row_TD.to(dtype) * weight_T[:, None] + y_TD
    assert isinstance(y_TD, Tensor)
    return y_TD


def _doomed(choice: Choice, fixed: Fixed, dtype: torch.dtype) -> Tensor:
    """The weights of the choices; NaN if something does not fit."""
    return choice.weight_N.to(dtype) * torch.where(fixed.over, float("nan"), 1.0).to(dtype)
