"""Bytes that move for good: rows to the ranks that are to keep them, and whether they arrived as they left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.comm.exchange import exchange
from moe.comm.group import Peers

WORD = 8  # bytes of the words that are checked, and of a checksum


def ship(row_NB: Tensor, send_R: Sequence[int], recv_R: Sequence[int], peers: Peers) -> tuple[Tensor, Tensor]:
    """row_NB: uint8. -> the rows that arrive here, and how many of them were damaged on the way.

    Every rank calls, with rows or without. Only whole words go: the rows must have a multiple of 8 bytes.
    """
    sealed = torch.cat([row_NB, checksums(row_NB).view(torch.uint8)], dim=1)
    arrived = exchange(sealed, send_R, recv_R, peers)
    row_MB = arrived[:, :-WORD].contiguous()
    damaged = (checksums(row_MB) != arrived[:, -WORD:].contiguous().view(torch.int64)).sum()
    return row_MB, damaged


def checksums(row_NB: Tensor) -> Tensor:
    """[N, 1]: the words of each row, each times an odd number of its own, summed modulo 2^64.

    Odd numbers have inverses, so a change of one word is always seen. It runs where the rows are.
    """
    word_NW = row_NB.contiguous().view(torch.int64)
    odd_W = torch.arange(word_NW.shape[1], device=row_NB.device) * 0x5851F42D4C957F2E + 1
    return (word_NW * odd_W).sum(dim=1, keepdim=True)
