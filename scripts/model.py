"""A small decoder-only language model on bytes, with a MoE layer in every block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe import MoE, MoEConfig
from moe.comm import Group
from placement import Plan
from scripts.serving.cache import Cache, Past, Spots


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

    def attend(self, x_TD: Tensor, past: Past, spots: Spots) -> Tensor:
        """Tokens of any sequences, each looking at its own past; they are in it afterwards."""
        q_TD, key_TD, value_TD = self.qkv(self.norm_in(x_TD)).chunk(3, dim=-1)
        past.write(key_TD, value_TD, spots)
        key_TPD, value_TPD, seen_TP = past.read(spots)
        q = rearrange(q_TD, "t (h d) -> t h 1 d", h=self.heads)
        k, v = (rearrange(part, "t p (h d) -> t h p d", h=self.heads) for part in (key_TPD, value_TPD))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TP[:, None, None, :])
        y_TD: Tensor = x_TD + self.out(rearrange(attended, "t h 1 d -> t (h d)"))
        return y_TD


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

    def extend(self, byte_T: Tensor, spots: Spots, cache: Cache) -> Tensor:
        """The same from a cache: some tokens more of some sequences, a sequence's in order and without gaps.

        byte_T: any number of tokens of each, none too. -> logits_TV, as forward would have them at these places
        """
        x_TD = self.embed(byte_T, spots)
        for block, past in zip(self.layers, cache.layers, strict=True):
            x_TD = block.attend(x_TD, past, spots)
            x_TD = x_TD + block.moe(block.norm_out(x_TD))
        return self.logits(x_TD)

    @property
    def layers(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def embed(self, byte_T: Tensor, spots: Spots) -> Tensor:
        x_TD: Tensor = self.byte(byte_T) + self.place(spots.place_T)
        return x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TV: Tensor = self.head(self.norm(x_TD))
        return logits_TV

    def cache(self, slots: int) -> Cache:
        shape = self.shape
        return Cache(shape.layers, slots, shape.length, shape.moe.dim, self.head.weight.detach())
