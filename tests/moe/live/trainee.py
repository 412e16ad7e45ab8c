"""What a member does in tests of training: it learns from the batch of each step, tells how things were after every
step, and dies where it is told to."""

from __future__ import annotations

import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from moe import Live, Loop, MoE, MoEConfig, Terms
from moe.backup import nobody, other_host
from moe.comm import Peers
from moe.outside import ReleasedError
from placement import Plan

CONFIG = MoEConfig(dim=8, hidden=16, num_experts=8, top_k=2, compute=Loop(), bias=True)
BATCH = 48
State = dict[str, NDArray[Any]]
PLACES = ("forward", "backward", "before the optimiser", "after the optimiser", "backup", "backup's end")
CROSSINGS = ("crossing", "crossing's end", "after the crossing", "next backup")


@dataclass(frozen=True, kw_only=True)
class Death:
    """Of a member, in that step, or in its first crossing."""

    member: int
    place: str
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """luck: noise from torch's own generator, which who comes later cannot know."""

    address: str
    plan: Plan | None
    deaths: tuple[Death, ...] = ()
    backup: bool = True
    every: int = 1
    luck: bool = False
    resume: Callable[[nn.Module, Any, Peers], int] | None = None


@dataclass
class Told:
    """states: after each step."""

    member: int
    retries: int = 0
    error: str = ""
    members: dict[int, int] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)


class Net(nn.Module):
    """Two layers whose routers do not learn, as a sum over ranks is another sum when there are more of them; and a
    part that every rank has, and that learns from the whole batch on each."""

    def __init__(self, group: Any = None, plan: Plan | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(MoE(CONFIG, group, plan and plan.placement_L[n]) for n in range(2))
        for layer in self.layers:
            layer.router.requires_grad_(False)
        self.dense = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))
        self.at: Callable[[str], None] = lambda place: None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers[0](x)
        self.at("forward")
        if x.requires_grad:
            x.register_hook(lambda _: self.at("backward"))
        return x + self.layers[1](x)


def optimizer_of(model: nn.Module) -> AdamW:
    return AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)


def learn(model: Net, optimizer: AdamW, step: int, rank: int, size: int, luck: bool) -> None:
    """This rank's contiguous part of the batch of a step."""
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    x = x + torch.randn(BATCH, 8) if luck else x
    mine = x.tensor_split(size)[rank]
    loss = F.mse_loss(model(mine), mine.flip(1), reduction="sum") / BATCH
    (loss + F.mse_loss(model.dense(x), x.flip(1))).backward()
    model.at("before the optimiser")
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.99
    optimizer.step()
    optimizer.zero_grad()
    model.get_buffer("seen").add_(1)
    model.at("after the optimiser")


def state_of(model: Net, optimizer: AdamW, luck: bool) -> State:
    """Of each expert here, and of what every rank has."""
    found = {"seen": model.get_buffer("seen").numpy().copy(), "lr": np.array(optimizer.param_groups[0]["lr"])}
    if luck:
        found["luck"] = torch.get_rng_state().numpy().copy()
    for name, weight in model.dense.named_parameters():
        lines = {"": weight.detach(), **optimizer.state[weight]}
        found |= {f"dense.{name}.{key}": line.numpy().copy() for key, line in lines.items()}
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, MoE)
        for name, weight in layer.experts.named_parameters():
            kept = optimizer.state[weight]
            for slot, expert in enumerate(layer.experts.expert_ids):
                lines = {"": weight.detach()[slot], **{key: kept[key][slot] for key in ("exp_avg", "exp_avg_sq")}}
                for key, line in (lines | {"step": kept["step"]}).items():
                    found[f"{number}.{expert}.{name}.{key}"] = line.numpy().copy()
    return found


def train(part: Part, pipe: Connection) -> None:
    """Until the service is scaled to nobody; tells its number first, what it saw last."""
    torch.set_num_threads(1)
    told = Told(0)
    try:
        with ExitStack() as stack:
            _train(part, pipe, told, stack)
    except Exception:
        told.error = traceback.format_exc()
    pipe.send(told)


def _train(part: Part, pipe: Connection, told: Told, stack: ExitStack) -> None:
    live: Live | None = None

    def at(place: str) -> None:
        for death in part.deaths if live is not None else ():
            in_time = place in CROSSINGS or live.steps == death.step
            if (death.member, death.place) == (live.member, place) and in_time:
                os.kill(os.getpid(), signal.SIGKILL)

    crossings = Counter[str]()

    def gathering() -> None:
        crossings["gathered"] += 1
        at("crossing" if crossings["gathered"] % 2 else "crossing's end")

    def shipping() -> None:
        at("backup")
        if crossings["gathered"]:
            at("next backup")

    for where, first in {
        "moe.training.ship": shipping,
        "moe.snapshot.Snapshot.finish": partial(at, "backup's end"),
        "moe.boundary.gather_counts": gathering,
        "moe.boundary._rehouse": partial(at, "after the crossing"),
    }.items():
        stack.enter_context(_before(where, first))

    def build(group: Peers, plan: Plan) -> Net:
        model = Net(group, plan, seed=0 if part.plan is not None else 7)
        model.at = at
        return model

    terms = Terms(
        timeout=15.0,
        beat=0.2,
        optimizer=optimizer_of,
        backup=other_host if part.backup else nobody,
        backup_every=part.every,
        resume=part.resume,
    )
    plan = part.plan
    live = Live.join(part.address, build, terms) if plan is None else Live.found(part.address, plan, build, terms)
    told.member = live.member
    pipe.send((live.member, os.getpid()))
    torch.manual_seed(1)
    assert isinstance(live.model, Net)
    assert isinstance(live.optimizer, AdamW)
    with suppress(ReleasedError):  # who came too late for the step that all went back to, and was not wanted again
        while live.serves():
            model, optimizer = live.model, live.optimizer
            live.run(lambda: learn(model, optimizer, live.steps, live.peers.rank, live.peers.size, part.luck))  # noqa: B023
            told.states[live.steps] = state_of(model, optimizer, part.luck)
            told.members[live.steps] = live.peers.size if live.epoch is not None else 0
    told.retries = live.retries
    live.close()


def _before(where: str, first: Callable[[], None]) -> Any:
    """A function before which another is called."""
    original = resolve_name(where)

    def called(*args: Any, **kwargs: Any) -> Any:
        first()
        return original(*args, **kwargs)

    return mock.patch(where, called)
