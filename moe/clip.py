"""The norm of all gradients of a model whose experts are spread over ranks, each expert counted once.

torch's own clip_grad_norm_ sees only the experts of its rank, so every rank would clip by another norm, and parameters
that ought to be alike would drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe.comm import Peers, here, is_shard, join, shard_powers
from moe.dispatch import upload
from moe.layer import MoE


def grad_norm(model: nn.Module, norm_type: float = 2.0) -> Tensor:
    """The norm over every parameter's gradient, the same on every rank. Every rank of every layer's group must call.

    Gradients of parameters outside the experts must already be the same on every rank, as DDP leaves them, or DTensors,
    as FSDP leaves them: of those each element is counted once. Where experts live does not change the norm, not even
    its last bit; of DTensors it may.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type}; use a number > 0, or inf")
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    shards = [weight for weight in model.parameters() if is_shard(weight)]
    elsewhere = {id(weight) for weight in shards}
    elsewhere |= {id(weight) for layer in layers for weight in layer.experts.parameters()}
    replicated = [p.grad for p in model.parameters() if id(p) not in elsewhere and p.grad is not None]
    total = _power(replicated, norm_type, _device(model))
    of_shards = shard_powers([(weight, weight.grad) for weight in shards], norm_type)
    if of_shards is not None:
        total = torch.maximum(total, of_shards) if norm_type == torch.inf else total + of_shards
    by_group: dict[int, tuple[Peers, list[Tensor]]] = {}
    for layer in layers:
        rows = [row_E.to(total.device) for row_E in _expert_powers(layer, norm_type)]
        by_group.setdefault(id(layer.peers.group), (layer.peers, []))[1].extend(rows)
    for peers, rows in by_group.values():
        if not rows:
            continue
        # Every expert has its place, and is added where it has it: the same sum wherever it lives.
        part = join(torch.cat(rows), [peers], norm_type)
        total = torch.maximum(total, part.max()) if norm_type == torch.inf else total + part.sum()
    return total if norm_type == torch.inf else total ** (1.0 / norm_type)


def clip_grad_norm(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients so that their norm is at most max_norm. -> the norm before. See `grad_norm`."""
    norm = grad_norm(model, norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"the gradient norm is {norm.item()}; pass error_if_nonfinite=False to clip regardless")
    shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = here(parameter.grad)
            grad.mul_(shrink.to(grad.device))  # not in the gradient's type: fp16 would round it to 0
    return norm


def _expert_powers(layer: MoE, norm_type: float) -> Iterator[Tensor]:
    """For each weight, row_E: the power of each expert at home here, zero for the others; their ranks count them."""
    home_E, rank = layer.placement.home_E, layer.peers.rank
    slots = [slot for slot, expert in enumerate(layer.experts.expert_ids) if home_E[expert] == rank]
    ids = [layer.experts.expert_ids[slot] for slot in slots]
    for weight in layer.experts.parameters():
        if is_shard(weight):  # its own mesh counts it
            continue
        row_E = torch.zeros(layer.config.num_experts, dtype=torch.float64, device=weight.device)
        if weight.grad is not None and slots:
            slot_H, expert_H = upload([slots, ids], weight.device)
            norm_S = torch.linalg.vector_norm(weight.grad.flatten(1), norm_type, dim=1, dtype=torch.float64)
            norm_H = norm_S[slot_H]
            row_E[expert_H] = norm_H if norm_type == torch.inf else norm_H**norm_type
        yield row_E


def _power(grads: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """sum |g| ** p, in float64; for p = inf the largest |g|."""
    # In float64 throughout: fp16 would overflow, and a sum of a million squares in fp32 is off by 6e-4 on a CPU.
    norms = [torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64) for grad in grads if grad.numel()]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    norm = torch.stack([norm.to(device) for norm in norms])
    return norm.max() if norm_type == torch.inf else (norm**norm_type).sum()


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
