"""A layer repeats the choices of another program, however its experts are spread; recomputing is heard, not obeyed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe import MoE, MoEConfig, World
from moe.comm import Peers, world_group
from routing import LeastLoaded, Routes, flips, record_routes, replay_routes

Worlds = Callable[[int], World]
TOKENS, DIM = 32, 6


def build(seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    config = MoEConfig(dim=DIM, hidden=5, num_experts=8, top_k=2, assigner=LeastLoaded(headroom=1.0, min_chunk=1))
    return MoE(config, world_group(), dtype=torch.float64)


def batch() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def replayed(routes: Routes) -> tuple[Tensor, Routes]:
    """Another model's choices, repeated by this one on this rank's tokens."""
    layer, peers = build(seed=1), Peers.of(world_group())
    mine = slice(peers.rank * TOKENS // peers.size, (peers.rank + 1) * TOKENS // peers.size)
    own = Routes(expert_TLK=routes.expert_TLK[mine])
    with replay_routes(layer, own), record_routes(layer) as log:
        y = checkpoint(layer, batch()[mine].requires_grad_(), use_reentrant=False)
        y.square().sum().backward()
    assert flips(log.taken, log.again).token > 0.5, "by itself, the recomputation would choose otherwise"
    return y.detach(), log.taken


def test_a_replay_is_by_expert_id_wherever_experts_live(world: Worlds) -> None:
    layer = build()
    with record_routes(layer) as said:
        layer(batch())
    alone, _ = replayed(said.taken)
    for ranks in (2, 4):
        ys, taken = zip(*world(ranks).run(replayed, said.taken))
        torch.testing.assert_close(torch.cat(ys), alone, rtol=0, atol=1e-12)
        assert np.array_equal(np.concatenate([routes.expert_TLK for routes in taken]), said.taken.expert_TLK)


class Unsteady(nn.Module):
    """Its input is a little different in every call, as if from a kernel that is not deterministic."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x_TD: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(self.calls), dtype=x_TD.dtype)
        y_TD: Tensor = self.layer(x_TD + 0.05 * noise)
        return y_TD


def test_flips_of_a_recomputation_are_counted_though_the_layer_repeats_its_choice() -> None:
    model = Unsteady(build())
    with record_routes(model) as log:
        checkpoint(model, batch().requires_grad_(), use_reentrant=False).sum().backward()
    assert len(log.taken.expert_TLK) == len(log.again.expert_TLK) == TOKENS, "what was computed is heard once"
    assert 0 < flips(log.taken, log.again).token < 1
