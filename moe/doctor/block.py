"""Block: what the doctor must know of a MoE block, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Said(NamedTuple):
    """What a router said of some tokens. logits, aux: [..., E] and one number, as they are in the graph. chosen_TE:
    bool, the experts each token wanted. price_E: what was taken off the scores. Any of them may be unknown."""

    logits: Tensor | None = None
    chosen_TE: Tensor | None = None
    score_TE: Tensor | None = None
    price_E: Tensor | None = None
    real_T: Tensor | None = None
    x_TD: Tensor | None = None
    aux: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A parameter that the output of a module is linear in, all of these together. axis: that of the output's width.

    counted_A: the lines of its first dimension that this rank counts; None for all of it.
    """

    parameter: nn.Parameter
    axis: int
    counted_A: tuple[int, ...] | None = None


Tell = Callable[[Said], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One MoE block. The doctor finds those it knows; describe yours with one of these, and only what you know of it.

    module: its forward is a call of the block. router: the module whose weight is its own, if it has one.
    listen(tell): set hooks that call tell(Said(...)) each time tokens are routed -> functions that take them off again.
    down: the last weights (and biases) of the experts; their output comes from `experts`, linear in them.
    price: what is taken off the scores, to be settled from loads. counts: rows for each expert since they were settled.
    settled: how often that was done. moves: there is a balancer, so prices ought to move. feeds: something
    balances loads: prices, or a loss. spread: its experts live on several ranks.
    sequence_first: its tokens come as [S, B], not [B, S].
    """

    name: str
    module: nn.Module
    num_experts: int
    listen: Callable[[Tell], list[Callable[[], None]]]
    host: str = "custom"
    top_k: int | None = None
    router: nn.Module | None = None
    experts: nn.Module | None = None
    down: Callable[[], tuple[Weight, ...]] = tuple
    held: Callable[[], int] | None = None
    price: Callable[[], Tensor | None] = lambda: None
    counts: Callable[[], Tensor | None] = lambda: None
    settled: Callable[[], int | None] = lambda: None
    moves: bool = False
    feeds: bool = False
    spread: bool = False
    sequence_first: bool = False


def listening(module: nn.Module, read: Callable[[Any, Any], Said | None]) -> Callable[[Tell], list[Callable[[], None]]]:
    """For Block.listen: after each forward of the module, tell read(inputs, output)."""

    def listen(tell: Tell) -> list[Callable[[], None]]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if (said := read(args, out)) is not None:
                tell(said)

        return [module.register_forward_hook(hook).remove]

    return listen


def chosen(expert_TK: Tensor, num_experts: int) -> Tensor:
    """-> chosen_TE. Numbers that are no expert's choose nothing."""
    table = torch.zeros(len(expert_TK), num_experts + 1, dtype=torch.bool, device=expert_TK.device)
    known_TK = expert_TK.where((expert_TK >= 0) & (expert_TK < num_experts), num_experts)
    return table.scatter_(1, known_TK.to(torch.int64), True)[:, :num_experts]
