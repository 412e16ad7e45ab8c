"""Triton's interpreter with a fence around memory: a kernel that leaves the tensors it was given fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor


def _bounds(tensors: list[Tensor]) -> np.ndarray[Any, Any]:
    """Where each begins and ends, one line each, in the order of memory."""
    spans = []
    for tensor in tensors:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    return np.array(sorted(spans), dtype=np.uint64).reshape(-1, 2)


@contextmanager
def fenced(beyond: set[int] | None = None) -> Iterator[None]:
    """An address that is masked may be any; every other must lie in a tensor that the launch was given.

    beyond: here the others are noted instead; what is read there is 0, and what is written is lost.
    """
    from triton.runtime import interpreter

    inside = np.zeros((0, 2), dtype=np.uint64)
    builder = interpreter.InterpreterBuilder
    load, store, add = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    prepare = interpreter.GridExecutor._init_args_hst

    def note(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal inside
        hosted = prepare(self, args, kwargs)
        given = [*hosted[0], *hosted[1].values()]
        inside = _bounds([arg for arg in given if isinstance(arg, Tensor) and arg.numel()])
        return hosted

    def inner(what: str, ptrs: Any, mask: Any) -> Any:
        """-> the mask, of those inside"""
        at, on = np.asarray(ptrs.data, dtype=np.uint64), np.asarray(mask.data, dtype=bool)
        line = np.searchsorted(inside[:, 0], at, side="right")  # of the last tensor that begins before
        out = on & (at >= np.concatenate([np.zeros(1, np.uint64), inside[:, 1]])[line])
        assert beyond is not None or not out.any(), f"it would {what} outside its tensors, {out.sum()} of {on.sum()}"
        if beyond is not None:
            beyond.update(at[out].tolist())
        return interpreter.TensorHandle(np.asarray(on & ~out), mask.dtype)

    def loaded(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return load(self, ptrs, inner("read", ptrs, mask), *rest, **named)

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, inner("write", ptrs, mask), *rest)

    def added(self: Any, kind: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return add(self, kind, ptrs, value, inner("add", ptrs, mask), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", note)
        patch.setattr(builder, "create_masked_load", loaded)
        patch.setattr(builder, "create_masked_store", stored)
        patch.setattr(builder, "create_atomic_rmw", added)
        yield
