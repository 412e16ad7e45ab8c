"""Welcome: what every rank has, sent to one that comes: routers, prices, shared experts, and all of the model besides
the experts. Statistics of a step under way are not told; who comes has none."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe.comm import Pace, Peers, receive_parcel, send_parcel
from moe.named import replicated, statistics


@torch.no_grad()
def send_replicated(model: nn.Module, rank: int, peers: Peers, pace: Pace) -> int:
    """-> bytes sent"""
    tensors = _told(model)
    return send_tensors(tensors, rank, peers, pace, next(iter(tensors.values())).device)


@torch.no_grad()
def receive_replicated(model: nn.Module, rank: int, peers: Peers, pace: Pace) -> None:
    """Into the model, which must have the same tensors."""
    tensors = _told(model)
    receive_tensors(tensors, rank, peers, pace, next(iter(tensors.values())).device)


def send_tensors(tensors: Mapping[str, Tensor], rank: int, peers: Peers, pace: Pace, device: torch.device) -> int:
    send_parcel(_digest(tensors, device), rank, peers, pace)
    row_B = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *map(_bytes_of, tensors.values())])
    send_parcel(row_B, rank, peers, pace)
    return len(row_B)


def receive_tensors(tensors: Mapping[str, Tensor], rank: int, peers: Peers, pace: Pace, device: torch.device) -> None:
    """Into tensors of the same names, shapes and types, in the same order."""
    digest = _digest(tensors, device)
    if not torch.equal(receive_parcel(len(digest), rank, peers, pace, device), digest):
        names = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"this model is not the one that serves; besides its experts it has {names}")
    row_B = receive_parcel(sum(len(_bytes_of(tensor)) for tensor in tensors.values()), rank, peers, pace, device)
    start = 0
    for tensor in tensors.values():
        tensor.copy_(row_B[start : start + tensor.nbytes].clone().view(tensor.dtype).view(tensor.shape))
        start += len(_bytes_of(tensor))


def _told(model: nn.Module) -> dict[str, Tensor]:
    own = set(statistics(model))
    return {name: tensor for name, tensor in sorted(replicated(model).items()) if name not in own}


def _digest(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Names, shapes and types, as one number."""
    told = repr([(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()])
    return torch.tensor([zlib.crc32(told.encode())], dtype=torch.int64, device=device).view(torch.uint8)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Filled up to whole words."""
    row_B = tensor.contiguous().reshape(-1).view(torch.uint8)
    return torch.cat([row_B, row_B.new_zeros(-len(row_B) % 8)])
