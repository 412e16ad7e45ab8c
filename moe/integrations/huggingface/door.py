"""Our expert parallelism under a name that transformers knows: DistributedConfig(..., ep_implementation="evenmoe").

transformers shards the experts, evenly and in order, loads them and puts FSDP2 around them; what is ours is how tokens
reach them: any assigner, and so experts that visit. It keeps the host's own parameters (DTensors), so its optimisers,
clipping and checkpoints work as they do without us. Prices and other placements take `parallelize_experts`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import transformers
from torch import Tensor, nn

from moe.compute import Fastest
from moe.config import MoEConfig
from moe.integrations.huggingface.experts import Host, HostExperts, names_of
from moe.integrations.huggingface.layer import HostMoE
from moe.stack import Stack
from placement import Placement
from routing import Assigner, AtHome

NAME = "evenmoe"


def register_ep_implementation(name: str = NAME, *, assigner: Assigner = AtHome()) -> str:
    """Tell transformers of our way to bring tokens to experts. -> the name"""
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:
        raise ValueError(
            f"transformers {transformers.__version__} has no registry of expert-parallel implementations; use 5.23 or "
            f"later, or parallelize_experts(model, group)"
        ) from None
    EPImplementationInterface.register(name, partial(Door, assigner=assigner))
    return name


def door_layers(model: nn.Module) -> dict[str, HostMoE]:
    """The layers behind the doors of a model, by the names of its experts, once it has run: to observe them."""
    doors = {name: module.__dict__.get("evenmoe_door") for name, module in model.named_modules()}
    return {name: door.layer for name, door in doors.items() if isinstance(door, Door) and door.layer is not None}


class Door:
    """What transformers makes for each of its experts modules, and calls in place of its forward."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any, *, assigner: Assigner) -> None:
        if tp_mesh.size() > 1:
            raise ValueError(
                f"tp_size={tp_mesh.size()}: ranks that share a batch would each send all of it; expected tp_size=1"
            )
        if experts.has_post_expert_norm:
            raise ValueError(f"{type(experts).__name__} norms the output of its experts; evenmoe cannot run it")
        self.experts, self.ep_mesh, self.assigner = experts, ep_mesh, assigner
        self.layer: HostMoE | None = None
        experts.evenmoe_door = self  # type: ignore[assignment]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.layer is None:
            self.layer = self._made(hidden_states, top_k_index.shape[1])
        self.layer.train(self.experts.training)
        y_TD: Tensor = self.layer(hidden_states, top_k_index, top_k_weights)
        return y_TD

    def _made(self, hidden_states: Tensor, top_k: int) -> HostMoE:
        """When the weights are there, and this rank's part of them is what the host's module holds."""
        host, ranks = Host(self.experts), self.ep_mesh.size()
        own, dim, hidden = host.stack().down.shape
        config = MoEConfig(
            dim=dim,
            hidden=hidden,
            num_experts=own * ranks,
            top_k=top_k,
            assigner=self.assigner,
            activation=host.activation,
            bias=bool(self.experts.has_bias),
        )
        placement = Placement(expert_RS=np.arange(own * ranks).reshape(ranks, own))
        return _Behind(self.experts, nn.Identity(), config, self.ep_mesh.get_group(), placement).to(
            hidden_states.device
        )


class _Behind(HostMoE):
    def _adopt(self, host: nn.Module, config: MoEConfig) -> HostExperts:
        return _Borrowed(host, self.placement.experts_of(self.peers.rank).tolist())


class _Borrowed(HostExperts):
    """Experts that stay the host's: it swaps its parameters for local tensors while we run."""

    def __init__(self, host: nn.Module, expert_ids: list[int]) -> None:
        nn.Module.__init__(self)
        self.host, self.names, self.compute = Host(host), names_of(host), Fastest()
        self.expert_ids, self.activation = tuple(expert_ids), self.host.activation

    def stack(self) -> Stack:
        return self.host.stack()
