"""A small decoder-only language model on bytes, with a MoE layer in every block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from moe import MoE, MoEConfig
from moe.comm import Group
from placement import Plan


@dataclass(frozen=True, kw_only=True)
class Shape:
    """moe: of every layer, but for its number. length: the longest sequence."""

    moe: MoEConfig
    layers: int = 4
    heads: int = 4
    length: int = 128


class Block(nn.Module):
    def __init__(self, shape: Shape, layer: int, group: Group, plan: Plan | None) -> None:
        super().__init__()
        dim = shape.moe.dim
        self.heads = shape.heads
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.moe = MoE(replace(shape.moe, layer=layer), group, None if plan is None else plan.placement_L[layer])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm_in(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.out(attended)
        y: Tensor = x + self.moe(self.norm_out(x))
        return y


class Bytes(nn.Module):
    """The next byte from those before it. byte_BT -> logits [B, T, 256]"""

    def __init__(self, shape: Shape, group: Group = None, plan: Plan | None = None) -> None:
        super().__init__()
        dim = shape.moe.dim
        self.shape = shape
        self.byte, self.place = nn.Embedding(256, dim), nn.Embedding(shape.length, dim)
        self.blocks = nn.ModuleList(Block(shape, layer, group, plan) for layer in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, byte_BT: Tensor) -> Tensor:
        x = self.byte(byte_BT) + self.place.weight[: byte_BT.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
