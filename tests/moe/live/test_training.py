"""Training while members come and go: experts, moments and counts of steps move together, so many bytes at a time."""

from __future__ import annotations

import traceback
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from moe import Loop, MoE, MoEConfig
from moe.comm import Peers
from moe.live import Live
from moe.terms import Terms
from placement import Plan
from tests.moe.live.member import even
from tests.moe.live.service import CONTEXT, Service

CONFIG = MoEConfig(dim=8, hidden=16, num_experts=8, top_k=2, compute=Loop(), bias=True)
BATCH = 48
EXPERT_BYTES = 3 * 4 * (32 * 8 + 32 + 8 * 16 + 8)
WELCOME_BYTES = 12_000
State = dict[tuple[int, int, str], NDArray[Any]]


class Net(nn.Module):
    """Two layers; their routers do not learn: a sum over ranks is another sum when there are more of them."""

    def __init__(self, group: Any, placements: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(MoE(CONFIG, group, placements and placements[n]) for n in range(2))
        for layer in self.layers:
            layer.router.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def optimizer_of(model: nn.Module) -> AdamW:
    return AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)


def learn(model: nn.Module, optimizer: AdamW, step: int, rank: int, size: int) -> None:
    """This rank's contiguous part of the batch of a step."""
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    mine = x.tensor_split(size)[rank]
    loss = F.mse_loss(model(mine), mine.flip(1), reduction="sum") / BATCH
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: AdamW) -> State:
    """All that belongs to each expert here."""
    found: State = {}
    for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
        for name, weight in layer.experts.named_parameters():
            kept = optimizer.state[weight]
            for slot, expert in enumerate(layer.experts.expert_ids):
                lines = {"": weight.detach()[slot], **{key: kept[key][slot] for key in ("exp_avg", "exp_avg_sq")}}
                for key, line in (lines | {"step": kept["step"]}).items():
                    found[number, expert, f"{name}.{key}"] = line.numpy().copy()
    return found


def train(address: str, plan: Plan | None, portion: int, pipe: Connection) -> None:
    """As a member, until the service is scaled to nobody; then tell the state as it was after every step."""
    torch.set_num_threads(1)

    def build(group: Peers, placed: Plan) -> Net:
        return Net(group, placed.placement_L, seed=0 if plan is not None else 7)

    try:
        terms = Terms(timeout=15.0, beat=0.2, optimizer=optimizer_of, bytes_per_boundary=portion)
        live = Live.join(address, build, terms) if plan is None else Live.found(address, plan, build, terms)
        pipe.send((live.member, 0))
        states = {}
        while live.serves():
            size, state = live.run(partial(one_step, live))
            states[live.steps] = (size, live.bytes, state)
        pipe.send((live.member, states))
        live.close()
    except Exception:
        pipe.send((0, traceback.format_exc()))


def one_step(live: Live) -> tuple[int, State]:
    """-> how many did it, and how things are after it"""
    assert isinstance(live.optimizer, AdamW)
    learn(live.model, live.optimizer, live.steps, live.peers.rank, live.peers.size)
    return live.peers.size, state_of(live.model, live.optimizer)


@pytest.mark.parametrize("portion", [0, 2 * EXPERT_BYTES - 8])
def test_a_run_that_grew_and_shrank_is_the_one_that_never_did_to_the_bit(portion: int) -> None:
    """2 -> 3 -> 2: weights, moments and counts of steps of every expert, after every step."""
    with Service(0, experts=8) as service:
        pipes = []

        def start(plan: Plan | None) -> None:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=train, args=(service.address, plan, portion, theirs), daemon=True)
            process.start()
            service.processes.append(process)
            pipes.append(ours)

        start(even(8, 2))
        start(even(8, 2))
        start(None)
        heard = [pipe.recv() for pipe in pipes]
        assert sorted(member for member, _ in heard) == [1, 2, 3], heard
        founders = [member for member, _ in heard[:2]]
        for count in (3, 2, 0):
            service.steps(3)
            service.scale(count)
            service.settle()
        told = dict(pipe.recv() for pipe in pipes)
    net = Net(None, None, seed=0)
    optimizer = optimizer_of(net)
    sizes = []
    for step in range(1, max(told[founders[0]]) + 1):
        learn(net, optimizer, step - 1, 0, 1)
        whole = state_of(net, optimizer)
        here = [told[member][step] for member in told if step in told[member]]
        sizes.append(here[0][0])
        together = {key: value for _, _, state in here for key, value in state.items()}
        assert together.keys() == whole.keys()
        for key, value in whole.items():
            assert np.array_equal(together[key], value), (step, key)
    assert [size for size, before in zip(sizes, [0, *sizes]) if size != before] == [2, 3, 2]
    for member in founders:
        sent = [step[1] for step in told[member].values()]
        most = max(after - before for before, after in pairwise(sent))
        assert most > 0
        assert not portion or most < 2 * EXPERT_BYTES + WELCOME_BYTES
