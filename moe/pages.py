"""New memory that costs little to touch.

Linux gives a process its memory a page of 4 KiB at a time, on first touch: 0.4 ms a MiB where it was measured. In pages
of 2 MiB it took a seventh of that; it has to be asked for them, and most systems then give them.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LEAST = 4 << 20  # bytes worth a call to the kernel: at least one whole page of 2 MiB is in them


def fresh(like: Tensor, *shape: int) -> Tensor:
    """like.new_empty(shape)"""
    return _roomy(like.new_empty(shape))


def fresh_like(tensor: Tensor) -> Tensor:
    """torch.empty_like, strides and all."""
    return _roomy(torch.empty_like(tensor))


def _roomy(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.itemsize
    if size >= _LEAST and type(tensor) is Tensor and tensor.device.type == "cpu" and (advise := _madvise()) is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, length, mmap.MADV_HUGEPAGE)  # a refusal is as good as none asked
    return tensor


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
