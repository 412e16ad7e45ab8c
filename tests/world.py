"""What a rank does in distributed tests: run a layer on its tokens, compare with `reference` over everybody's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe import MoE, MoEConfig, reference
from moe.comm import Peers, sum_over
from placement import Placement
from routing import Assignment, AtHome

KINDS = ["none", "reentrant", "non-reentrant", "nested", "selective"]


def save_top_k(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in (torch.ops.aten.topk.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run(kind: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), under activation checkpointing of this kind."""
    if kind == "none":
        return function(x)
    if kind == "nested":
        inner = partial(checkpoint, function, use_reentrant=False)
        return checkpoint(inner, x, use_reentrant=False)  # type: ignore[no-any-return]
    if kind == "selective":
        contexts = partial(create_selective_checkpoint_contexts, save_top_k)
        return checkpoint(function, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]
    return checkpoint(function, x, use_reentrant=kind == "reentrant")  # type: ignore[no-any-return]


class Seen(NamedTuple):
    """The largest relative error of anything a rank can compare, and what the assigner decided."""

    error: float
    worst: str
    load_R: list[int]
    loans: int
    most_ranks: int
    forwards: int


def tokens(dim: int, tokens_R: Sequence[int], skew: float, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Each rank's tokens; skew pulls them all the same way, so that some experts are hot."""
    generator = torch.Generator().manual_seed(seed)
    pull = torch.randn(dim, generator=generator, dtype=torch.float64)
    return [(torch.randn(n, dim, generator=generator, dtype=torch.float64) + skew * pull).to(dtype) for n in tokens_R]


def against_reference(
    config: MoEConfig,
    tokens_R: Sequence[int],
    *,
    skew: float = 1.0,
    placement: Placement | None = None,
    recompute: str = "none",
    padded: bool = False,
    length: int | None = None,
    group: Any = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> Seen:
    """Outputs and every gradient of this rank's layer, compared with the literal loop over everybody's tokens.

    length: tokens are sequences of so many, of which each has a masked share; else each rank's are one sequence.
    """
    group = dist.group.WORLD if group is None else group
    layer, peers = build(config, group, placement, dtype), Peers.of(group)
    xs = tokens(config.dim, tokens_R, skew, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 7)
    ws = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in xs]
    valids = [torch.rand(len(x), generator=generator) < 0.7 for x in xs] if padded else [None] * len(xs)
    seen: list[Assignment] = []
    layer.observe(lambda choice, assignment: seen.append(assignment))

    ratios = [torch.rand(len(x) // length, generator=generator) for x in xs] if length else [None] * len(xs)

    x, valid, ratio = xs[peers.rank].clone().requires_grad_(), valids[peers.rank], ratios[peers.rank]

    def call(x_TD: Tensor) -> Tensor:
        if length is None:
            return layer(x_TD, valid)  # type: ignore[no-any-return]
        of_sequences = None if valid is None else valid.view(-1, length)
        return layer(x_TD.view(-1, length, x_TD.shape[1]), of_sequences, ratio).view_as(x_TD)  # type: ignore[no-any-return]

    torch.manual_seed(seed)  # for whatever is drawn by lot
    y = run(recompute, call, x)
    torch.manual_seed(seed + 1)
    (y * ws[peers.rank]).sum().backward()

    full = build(replace(config, assigner=AtHome()), None, None, dtype)
    x_all = torch.cat(xs).requires_grad_()
    parts = []
    for x_TD, valid_T, ratio_B in zip(x_all.split([len(x) for x in xs]), valids, ratios):
        torch.manual_seed(seed)
        parts.append(by_the_book(full, x_TD, valid_T, length, ratio_B))
    y_all = torch.cat(parts)
    (y_all * torch.cat(ws)).sum().backward()

    start = sum(len(other) for other in xs[: peers.rank])
    mine = slice(start, start + len(x))
    assert x.grad is not None
    assert x_all.grad is not None
    pairs = [("y", y.detach(), y_all.detach()[mine]), ("dx", x.grad, x_all.grad[mine])]
    pairs += _gradients(layer, full, peers)
    worst, error = max(((name, relative(got, want)) for name, got, want in pairs), key=lambda pair: pair[1])
    quota_RE = seen[0].quota_RE
    loans = len(seen[0].loans(layer.placement))
    return Seen(error, worst, seen[0].load_R.tolist(), loans, int((quota_RE > 0).sum(axis=0).max()), len(seen))


def build(config: MoEConfig, group: Any, placement: Placement | None, dtype: torch.dtype) -> MoE:
    torch.manual_seed(0)
    return MoE(config, group, placement, dtype=torch.float64).to(dtype)


def by_the_book(
    full: MoE,
    x_TD: Tensor,
    valid_T: Tensor | None = None,
    length: int | None = None,
    ratio_B: Tensor | None = None,
) -> Tensor:
    """One process's layer, with its experts run by `reference` on gradients of their own parameters."""
    choice = full.router(x_TD, valid_T, length=length, ratio_B=ratio_B)
    state = {
        expert: {name: weight[slot] for name, weight in full.experts.named_parameters()}
        for slot, expert in enumerate(full.experts.expert_ids)
    }
    y_TD = reference(x_TD, choice, state, full.config.activation)
    if full.shared is not None:
        shared_TD = full.shared(x_TD)
        y_TD = y_TD + (shared_TD if valid_T is None else shared_TD * valid_T[:, None])
    return y_TD


def relative(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1.0)).item()
    return error if math.isfinite(error) else math.inf  # max() would pass over a NaN


def _gradients(layer: MoE, full: MoE, peers: Peers) -> list[tuple[str, Tensor, Tensor]]:
    pairs = []
    of_experts = {id(weight) for weight in layer.experts.parameters()}
    whole = dict(full.named_parameters())
    for name, parameter in layer.named_parameters():
        if not parameter.numel():  # of a rank without experts
            continue
        want = whole[name].grad
        want = torch.zeros_like(whole[name]) if want is None else want  # the loop touches nothing that got no row
        assert parameter.grad is not None, f"{name} got no gradient"
        if id(parameter) in of_experts:
            pairs.append((name, parameter.grad, want[list(layer.experts.expert_ids)]))
        else:
            grad = parameter.grad.clone()
            sum_over([grad], peers)
            pairs.append((name, grad, want))
    return pairs
