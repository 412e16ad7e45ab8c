"""Experts under data parallelism: what DDP must leave alone, and how their gradients are averaged instead.

An expert's gradient already holds the tokens of every rank of its group. DDP averages the other gradients over all its
ranks; so that one learning rate means the same for both, an expert's is summed over the ranks that hold the same expert
and divided by the same number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe.broadcast import buffers_of_a_rank
from moe.comm import Group, Peers, sum_over
from moe.layer import MoE


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that differ from rank to rank, by name."""
    for prefix, module in model.named_modules():
        if isinstance(module, MoE):
            for name, weight in module.experts.named_parameters():
                yield f"{prefix}.experts.{name}".lstrip("."), weight


def leave_experts_alone(model: nn.Module) -> nn.Module:
    """Tell DDP not to touch what differs from rank to rank; call it on a model before wrapping it. -> the model

    That is the experts, and what each rank has seen of the step: DDP would overwrite it with what its first rank saw.
    """
    names: list[str] = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    names += [name for name, _ in expert_parameters(model)]
    names += buffers_of_a_rank(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
    return model


@torch.no_grad()
def average_expert_grads(model: nn.Module, data_parallel: Group, replicas: Group = None) -> None:
    """After backward and before the optimiser: what DDP did to the other gradients, for the experts'.

    data_parallel: the ranks DDP averages over. replicas: the ranks that hold the same experts as this one, where there
    are several expert-parallel groups; None if there is one.
    """
    weights = [weight for _, weight in expert_parameters(model) if weight.requires_grad]
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.div_(Peers.of(data_parallel).size)
    sum_over([weight.grad for weight in weights if weight.grad is not None], Peers.of(replicas))
