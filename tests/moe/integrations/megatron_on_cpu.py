"""Megatron-Core on a machine without a GPU: what it takes from torch.cuda, for as long as a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from queue import Queue
from typing import Any
from unittest.mock import patch

import torch


class _Stream:
    """Stands for streams and events: everything is done at once, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: _Stream()


@contextmanager
def _fork(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Random numbers come from torch's own generator: there is no tensor parallelism to keep apart."""
    yield


def _write_here(transforms: Any, use_msc: bool, rank: int, buckets: Any, results: Any) -> None:
    """In place of processes that write a checkpoint: the ranks of a test are daemons, which may have none."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written = {}
    for number, bucket in enumerate(buckets):
        said, count = Queue(), Queue()  # type: ignore[var-annotated]
        count.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, said, count, use_fsync=False)
        written[number] = said.get()[1]
    results.put(written)


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def as_asked(tensor: Any, as_numpy: bool = False, **options: Any) -> Any:
        """Megatron makes numbers of tensors that come from a GPU alone."""
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else move(tensor, as_numpy=as_numpy, **options)

    with ExitStack() as stack:
        for name, stand_in in {
            "current_device": lambda: torch.device("cpu"),
            "Stream": _Stream,
            "Event": _Stream,
            "current_stream": _Stream,
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda *args: None,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        # 0.16 names it in the router whether TransformerEngine is there or not.
        stack.enter_context(patch.object(moe_utils, "te_general_gemm", None, create=True))
        stack.enter_context(patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", as_asked))
        stack.enter_context(patch.object(random.CudaRNGStatesTracker, "fork", _fork))
        stack.enter_context(patch.object(random, "_get_all_rng_states", lambda: (torch.get_rng_state(), None, None)))
        stack.enter_context(patch.object(random, "_set_all_rng_states", lambda cpu, *_: torch.set_rng_state(cpu)))
        stack.enter_context(patch.object(filesystem_async, "_get_write_results_queue", Queue))
        writer = filesystem_async.FileSystemWriterAsync
        stack.enter_context(patch.object(writer, "write_preloaded_data_multiproc", staticmethod(_write_here)))
        yield
