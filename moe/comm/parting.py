"""What must be said while the ranks still hear each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def before_parting(last_words: Callable[[], object]) -> Iterator[None]:
    """Within it, last_words() is called before a process group is destroyed, by whoever does that."""
    original = dist.destroy_process_group

    def destroy(*args: Any, **kwargs: Any) -> None:
        last_words()
        original(*args, **kwargs)

    dist.destroy_process_group = destroy
    try:
        yield
    finally:
        dist.destroy_process_group = original
