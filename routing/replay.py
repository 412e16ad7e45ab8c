"""Replay: what routers chose, kept by expert id and chosen again; and the share of it that would have flipped.

Two programs that compute the same model choose differently where two scores are close: an inference engine in bf16 and
a trainer in fp32, a forward and its recomputation, a token alone and in a batch. Reinforcement learning then trains
other experts than those that spoke. So the choices of one are recorded and the other is made to repeat them:

    with record_routes(engine) as log:
        engine(tokens)
    with replay_routes(trainer, log.taken):
        trainer(tokens)

Experts are named by their ids, never by where they live, so that the two may be spread over ranks in any two ways. The
weights of what is repeated are the trainer's own, with their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from routing.choice import NOWHERE, Choice
from routing.router import Router
from routing.select import Rows, Tokens, token_major

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """expert_TLK: the experts of each token in each layer, in the order in which a model is given them; -1: none."""

    expert_TLK: IntArray

    def __post_init__(self) -> None:
        table = np.asarray(self.expert_TLK)
        if table.ndim != 3 or table.dtype.kind not in "iu" or table.min(initial=0) < NOWHERE:
            raise ValueError(
                f"expert_TLK is [tokens, layers, experts a token], of ids or -1; got {table.shape} of {table.dtype}"
            )
        object.__setattr__(self, "expert_TLK", table.astype(np.int64))

    @classmethod
    def of_layers(cls, layers: Sequence[IntArray]) -> Self:
        """From expert_TK of each layer."""
        tokens = {len(expert_TK) for expert_TK in layers}
        if len(tokens) != 1:
            raise ValueError(
                f"the routers heard {[len(expert_TK) for expert_TK in layers]} tokens; a record needs every one of "
                f"them called once for each token"
            )
        most = max(expert_TK.shape[1] for expert_TK in layers)
        table = np.full((tokens.pop(), len(layers), most), NOWHERE, dtype=np.int64)
        for layer, expert_TK in enumerate(layers):
            table[:, layer, : expert_TK.shape[1]] = expert_TK
        return cls(expert_TLK=table)

    def save(self, path: str | Path) -> None:
        np.savez_compressed(path, expert_TLK=self.expert_TLK.astype(np.int32))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        with np.load(path) as file:
            return cls(expert_TLK=file["expert_TLK"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Flips:
    """token_L: share of tokens whose set of experts differs. row_L: share of their choices. token: in any layer."""

    token_L: NDArray[np.float64]
    row_L: NDArray[np.float64]
    token: float


def flips(first: Routes, second: Routes) -> Flips:
    """How far two records of the same tokens differ. The order of a token's experts does not count, nor padding."""
    one, two = first.expert_TLK, second.expert_TLK
    if one.shape != two.shape:
        raise ValueError(f"records of the same tokens have one shape; got {one.shape} and {two.shape}")
    real_T = (one != NOWHERE).any(axis=(1, 2)) | (two != NOWHERE).any(axis=(1, 2))
    one, two = one[real_T], two[real_T]
    kept_TLK = (one[..., :, None] == two[..., None, :]).any(axis=-1) | (one == NOWHERE)
    back_TLK = (two[..., :, None] == one[..., None, :]).any(axis=-1) | (two == NOWHERE)
    chosen_L = np.maximum((one != NOWHERE).sum(axis=(0, 2)), 1)
    flipped_TL = ~(kept_TLK.all(axis=-1) & back_TLK.all(axis=-1))
    tokens = max(len(one), 1)
    return Flips(
        token_L=flipped_TL.sum(axis=0) / tokens,
        row_L=(~kept_TLK).sum(axis=(0, 2)) / chosen_L,
        token=float(flipped_TL.any(axis=1).sum() / tokens),
    )


class RouteLog:
    """What the routers of a model chose.

    taken: what was used. wanted: what they would have chosen by themselves; it differs where they were made to repeat
    another choice. again: what they would have chosen in recomputations, had they not been made to repeat. So

        flips(log.wanted, log.taken)   what a replay removed
        flips(log.taken, log.again)    what recomputing would have flipped, in models that are recomputed whole
    """

    def __init__(self, routers: int) -> None:
        self._heard: dict[str, list[list[IntArray]]] = {
            kind: [[] for _ in range(routers)] for kind in ("taken", "wanted", "again")
        }

    @property
    def taken(self) -> Routes:
        return self._routes("taken")

    @property
    def wanted(self) -> Routes:
        return self._routes("wanted")

    @property
    def again(self) -> Routes:
        return self._routes("again")

    def hear(self, layer: int, router: Router, choice: Choice, rows: Rows | None) -> None:
        """rows: what the router was made to choose, if it was."""
        taken = _on_host(choice.wanted_N, choice.top_k)
        wanted = taken if rows is None else _own(router, choice)
        if _recomputing():
            self._heard["again"][layer].append(wanted)
        else:
            self._heard["taken"][layer].append(taken)
            self._heard["wanted"][layer].append(wanted)

    def _routes(self, kind: str) -> Routes:
        layers = self._heard[kind]
        return Routes.of_layers([np.concatenate(calls) if calls else np.empty((0, 1), np.int64) for calls in layers])


@contextmanager
def record_routes(model: nn.Module) -> Iterator[RouteLog]:
    """Within it, every Router of the model is heard; copies to the host, once a layer and call."""
    routers = _routers(model)
    log = RouteLog(len(routers))

    def listen(layer: int) -> Callable[..., None]:
        def hook(router: Router, args: tuple[Any, ...], options: dict[str, Any], choice: Choice) -> None:
            log.hear(layer, router, choice, _given(args, options))

        return hook

    handles = [router.register_forward_hook(listen(i), with_kwargs=True) for i, router in enumerate(routers)]
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_routes(model: nn.Module, routes: Routes) -> Iterator[None]:
    """Within it, every Router of the model chooses what is written, token after token over however many calls.

    The tokens must be those of this rank, in order, and all be called for. Recomputations repeat the choice by
    themselves. A router of another program (a host's) must be given experts for every token, padding included.
    """
    routers = _routers(model)
    table, used = routes.expert_TLK, [0] * len(routers)
    if table.shape[1] != len(routers):
        raise ValueError(f"the routes have {table.shape[1]} layers, the model {len(routers)} routers")
    for layer, router in enumerate(routers):
        num_experts = len(router.price_E)
        if (largest := table[:, layer].max(initial=0)) >= num_experts:
            raise ValueError(f"expert {largest} was chosen in layer {layer}, whose router has {num_experts} experts")

    def inject(layer: int) -> Callable[..., Any]:
        def hook(router: Router, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if _given(args, options) is not None:
                return None
            if _recomputing():
                raise ValueError("a Router by itself in a checkpoint cannot be replayed; MoE repeats its choices")
            here = slice(used[layer], used[layer] + len(args[0]))
            if here.stop > len(table):
                raise ValueError(
                    f"layer {layer} is called for token {here.stop}; the routes are of {len(table)} tokens"
                )
            used[layer] = here.stop
            expert_TK = torch.from_numpy(table[here, layer, : router.top_k]).to(router.price_E.device)
            return args[:2], {**options, "rows": token_major(expert_TK)}

        return hook

    handles = [router.register_forward_pre_hook(inject(i), with_kwargs=True) for i, router in enumerate(routers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if (left := [layer for layer, count in enumerate(used) if count != len(table)]) != []:
        raise ValueError(f"layer {left[0]} was called for {used[left[0]]} tokens, the routes are of {len(table)}")


def _routers(model: nn.Module) -> list[Router]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise ValueError("the model has no Router; spread a host's experts first, or use moe.MoE")
    return routers


def _given(args: tuple[Any, ...], options: dict[str, Any]) -> Rows | None:
    """The `rows` of a call of Router.forward."""
    rows: Rows | None = args[2] if len(args) > 2 else options.get("rows")
    return rows


def _recomputing() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


@torch.no_grad()
def _own(router: Router, choice: Choice) -> IntArray:
    """What a router that was made to choose would have chosen: by its own scores, at its own prices."""
    score_TE = choice.score_TE.detach()
    price_E = router.balancer.quote(
        score_TE, router.price_E, router.top_k, valid_T=choice.valid_T, settled=router.settled
    )
    rows = router.select_rows(score_TE, price_E, Tokens(choice.valid_T, choice.length))
    expert_N = rows.expert_N
    if choice.valid_T is not None:
        expert_N = expert_N.where(choice.valid_T[rows.token_N], NOWHERE)
    return _on_host(expert_N, rows.top_k)


def _on_host(expert_N: torch.Tensor, top_k: int | None) -> IntArray:
    if top_k is None:
        raise ValueError("routes are of routers that choose the same number of experts for every token")
    expert_TK: IntArray = expert_N.reshape(-1, top_k).cpu().numpy()
    return expert_TK
