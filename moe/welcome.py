"""Welcome: what every rank has, sent to one that comes: routers, prices, shared experts, and all of the model besides
the experts. Statistics of a step under way are not told; who comes has none."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from moe.comm import Pace, Peers, receive_parcel, send_parcel
from moe.named import replicated, statistics


@torch.no_grad()
def send_replicated(model: nn.Module, rank: int, peers: Peers, pace: Pace) -> int:
    """-> bytes sent"""
    tensors = _told(model)
    send_parcel(_digest(tensors), rank, peers, pace)
    row_B = torch.cat([_bytes_of(tensor) for tensor in tensors.values()])
    send_parcel(row_B, rank, peers, pace)
    return len(row_B)


@torch.no_grad()
def receive_replicated(model: nn.Module, rank: int, peers: Peers, pace: Pace) -> None:
    """Into the model, which must have the same tensors."""
    tensors = _told(model)
    device = next(iter(tensors.values())).device
    digest = _digest(tensors)
    if not torch.equal(receive_parcel(len(digest), rank, peers, pace, device), digest):
        names = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"this model is not the one that serves; besides its experts it has {names}")
    size = sum(len(_bytes_of(tensor)) for tensor in tensors.values())
    row_B = receive_parcel(size, rank, peers, pace, device)
    start = 0
    for tensor in tensors.values():
        end = start + tensor.nbytes
        tensor.copy_(row_B[start:end].clone().view(tensor.dtype).view(tensor.shape))
        start += len(_bytes_of(tensor))


def _told(model: nn.Module) -> dict[str, Tensor]:
    own = set(statistics(model))
    return {name: tensor for name, tensor in sorted(replicated(model).items()) if name not in own}


def _digest(tensors: dict[str, Tensor]) -> Tensor:
    """Names, shapes and types, as one number."""
    told = repr([(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()])
    device = next(iter(tensors.values())).device
    return torch.tensor([zlib.crc32(told.encode())], dtype=torch.int64, device=device).view(torch.uint8)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Filled up to whole words."""
    row_B = tensor.contiguous().reshape(-1).view(torch.uint8)
    return torch.cat([row_B, row_B.new_zeros(-len(row_B) % 8)])
