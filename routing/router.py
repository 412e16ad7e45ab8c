"""Router: x -> Choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from routing.balancer import Balancer, Unpriced
from routing.capacity import Drop, Dropless
from routing.choice import NOWHERE, Choice
from routing.likeness import outside_autocast
from routing.metrics import mean_score
from routing.schedule import Sparsify
from routing.scores import Score, Softmax, at_least_fp32
from routing.select import Rows, Select, Tokens, TopK, check_tokens
from routing.weigh import Weigh

_STAT = "stat_"


class Router(nn.Module):
    """x_TD -> Choice: score every expert, let the balancer quote prices, choose by score less price, weigh by score.

    The logits are computed in fp32 or better whatever the type of x, outside autocast. So are their gradients; those of
    an fp32 x only if backward is called outside autocast, too, as torch advises. The standing prices, the number of
    times they were settled and the statistics of the step so far are buffers: they keep their types under `.bfloat16()`
    and friends, and travel in the state dict. `forward` writes none of them; `observe` adds a choice to
    the statistics, `settle` closes a step and keeps its common statistics in `closed`, for meters.

    top_k: a number, or a schedule of it by step and layer. jitter: in training, x is multiplied by numbers between
    1 - jitter and 1 + jitter before it is scored.
    """

    price_E: Tensor
    settled: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int | Sparsify,
        *,
        score: Score = Softmax(),
        select: Select = TopK(),
        weigh: Weigh = Weigh(),
        balancer: Balancer = Unpriced(),
        drop: Drop = Dropless(),
        jitter: float = 0.0,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_routing(num_experts, top_k, layer, select, balancer, jitter)
        self.schedule, self.layer = top_k, layer
        self.score, self.select, self.weigh, self.balancer, self.drop = score, select, weigh, balancer, drop
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.register_buffer("price_E", torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.register_buffer("settled", torch.zeros((), device=device, dtype=torch.int64))
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("load_E", "kept_E", "score_E"), (num_experts,))
        shapes |= {"tokens": (), **balancer.shapes(num_experts)}
        for name, shape in shapes.items():
            self.register_buffer(_STAT + name, torch.zeros(shape, device=device, dtype=torch.float64))
        self.closed: dict[str, Tensor] = {}
        self._step_seen: tuple[Tensor, int, int] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        for buffer in self.buffers():
            nn.init.zeros_(buffer)

    @property
    def step(self) -> int:
        """How often the prices were settled. Read from the device only after somebody else wrote the buffer."""
        seen = self._step_seen
        if seen is None or seen[0] is not self.settled or seen[1] != _version(self.settled):
            seen = self._step_seen = (self.settled, _version(self.settled), int(self.settled))
        return seen[2]

    @property
    def top_k(self) -> int:
        return self.schedule if isinstance(self.schedule, int) else self.schedule(self.step, self.layer)

    @property
    def stats(self) -> dict[str, Tensor]:
        """The statistics of the step so far: float64 sums over this rank's tokens, to be summed over the ranks."""
        return {name.removeprefix(_STAT): buffer for name, buffer in self.named_buffers() if name.startswith(_STAT)}

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        rows: Rows | None = None,
        *,
        length: int | None = None,
        ratio_B: Tensor | None = None,
    ) -> Choice:
        """valid_T: False for padding, which goes nowhere. rows: choose these again instead of deciding anew. length,
        ratio_B: of sequences, as in Tokens; without a length the tokens are one sequence."""
        tokens = Tokens(valid_T, x_TD.shape[0] if length is None else length, ratio_B)
        check_tokens(tokens, x_TD.shape[0])
        if valid_T is not None:  # whatever padding holds, NaN included, must not reach a gradient
            x_TD = x_TD.where(valid_T[:, None], 0.0)
        if self.training and self.jitter:
            x_TD = x_TD.to(at_least_fp32(x_TD.dtype))
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logit_TE = self.logits(x_TD)
        score_TE = self.score(logit_TE)
        luck_TE = self.drop.luck(score_TE)  # drawn in a recomputation too, for whoever draws next
        price_E = self.price_E
        if rows is None:
            rows, price_E = self.choose(score_TE.detach(), tokens, luck_TE)
        elif torch._C._len_torch_dispatch_stack():
            # Selective checkpointing hands out saved results in the order of the calls: a top-k that it saved must be
            # called again, though its answer is known, or the next caller would get it.
            self.choose(score_TE.detach(), tokens, luck_TE)
        return Choice(
            token_N=rows.token_N,
            expert_N=rows.expert_N,
            wanted_N=rows.expert_N if rows.wanted_N is None else rows.wanted_N,
            weight_N=self.weigh(score_TE, rows),
            score_TE=score_TE,
            logit_TE=logit_TE,
            price_E=price_E,
            valid_T=valid_T,
            length=tokens.length,
            top_k=rows.top_k,
            k=self.top_k,
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        with outside_autocast(x_TD):
            return self.score.logits(x_TD, self.weight)

    @torch.no_grad()
    def choose(self, score_TE: Tensor, tokens: Tokens, luck_TE: Tensor | None) -> tuple[Rows, Tensor]:
        """-> the rows, and the prices they were chosen at"""
        quoted_E = self.balancer.quote(score_TE, self.price_E, self.top_k, valid_T=tokens.valid_T, settled=self.settled)
        if quoted_E is self.price_E:
            quoted_E = quoted_E.clone()  # whoever keeps the choice keeps its prices, not the next step's
        rows = self.select_rows(score_TE, quoted_E, tokens)
        if tokens.valid_T is not None:
            rows = rows._replace(expert_N=rows.expert_N.where(tokens.valid_T[rows.token_N], NOWHERE))
        return self.drop(rows, score_TE, luck_TE, self.top_k, tokens), quoted_E

    def select_rows(self, score_TE: Tensor, price_E: Tensor, tokens: Tokens) -> Rows:
        return self.select(score_TE, price_E, self.top_k, tokens)

    @torch.no_grad()
    def observe(self, choice: Choice) -> None:
        """Add a choice to the statistics. Once for each token: not in evaluation, and not again in recomputations."""
        score_E = mean_score(choice.score_TE, choice.valid_T) * choice.tokens
        common = {"load_E": choice.wanted_E, "kept_E": choice.load_E, "score_E": score_E, "tokens": choice.tokens}
        for name, value in {**common, **self.balancer.observe(choice, self.price_E)}.items():
            self.get_buffer(_STAT + name).add_(value)

    @torch.no_grad()
    def settle(self) -> None:
        """Close a step: new prices from the statistics, summed over the ranks before. They start again from nothing."""
        stats, step = self.stats, self.step
        self.price_E.copy_(self.balancer.settle(self.price_E, stats, self.top_k, settled=self.settled))
        self.closed = {name: stats[name].clone() for name in ("load_E", "kept_E", "score_E", "tokens")}
        for stat in stats.values():
            stat.zero_()
        self.settled += 1
        self._step_seen = (self.settled, _version(self.settled), step + 1)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose buffers count their versions anew."""
        return self.__dict__ | {"_step_seen": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers with the module, but never change their types: a bf16 price stops moving at 0.5."""
        before = dict(self._buffers)
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            assert buffer is not None
            after = self.get_buffer(name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return module  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Prices of another balancer are welcome; the statistics of its unfinished step mean nothing to this one. All
        of them: tokens whose scores it did not see must not count, either. They are known by their names and shapes:
        those of a Quantile with another reach, or of EdgeQuantile, pass for one's own. That makes the next prices less
        good, and those after them as good as ever; nothing is saved with them that would tell."""
        wanted = {prefix + _STAT + name: stat for name, stat in self.stats.items()}
        saved = [key for key in state_dict if key.startswith(prefix + _STAT)]
        if {key: state_dict[key].shape for key in saved} != {key: stat.shape for key, stat in wanted.items()}:
            for key in saved:
                del state_dict[key]
            device = state_dict.get(prefix + "price_E", self.price_E).device
            state_dict |= {key: torch.zeros_like(stat, device=device) for key, stat in wanted.items()}
        for name, buffer in self.named_buffers():  # load_state_dict(assign=True) would take any type
            if (key := prefix + name) in state_dict:
                state_dict[key] = state_dict[key].to(buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        parts = (self.score, self.select, self.weigh, self.balancer, self.drop)
        return f"{dim} -> {self.schedule} of {num_experts}, {', '.join(map(str, parts))}"


def check_routing(
    num_experts: int, top_k: int | Sparsify, layer: int, select: Select, balancer: Balancer, jitter: float
) -> None:
    """Raise ValueError where a router's parts do not fit together, at any step."""
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter={jitter}; use 0 for none, or a little, below 1")
    for k in (top_k,) if isinstance(top_k, int) else top_k.of_layer(layer):
        select.check(num_experts, k)
        balancer.check(num_experts, k)


def _version(tensor: Tensor) -> int:
    """How often it was written in place; tensors made in inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version
