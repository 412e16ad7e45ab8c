"""unseen: what selective checkpointing is not to see.

It saves what the policy's operations gave, and in the recomputation hands that out instead of calling them again. That
is wrong of a decision, which a recomputation does not make again, and of an operation that writes where it was told to,
as collectives do: the memory would stay as it was found.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def unseen() -> AbstractContextManager[object]:
    """Where a selective checkpoint watches, no mode sees what is done inside; elsewhere all modes see it."""
    if torch._C._len_torch_dispatch_stack() and any(
        isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack()
    ):
        return _disable_current_modes()
    return nullcontext()
