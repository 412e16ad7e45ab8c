"""What DistributedDataParallel must not broadcast: before a forward it gives every rank the buffers of the first.

It may be told beforehand, by `leave_experts_alone`. If it was not, the first forward inside it tells it: by then it has
overwritten nothing but zeros, and nobody's statistics are lost in a step of several forwards.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe.census import Pool
from routing import Router

_TOLD = "_evenmoe_told"


def buffers_of_a_rank(model: nn.Module) -> Iterator[str]:
    """The buffers that hold what this rank has seen, by name."""
    for prefix, module in model.named_modules():
        if isinstance(module, Router | Pool):
            yield from (f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers() if name != "price_E")


def keep_from_broadcast() -> None:
    """Within a forward: tell the DistributedDataParallel that runs it, if any, once."""
    ddp = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if ddp is not None and not hasattr(ddp, _TOLD):
        ddp.parameters_to_ignore.update(buffers_of_a_rank(ddp.module))
        setattr(ddp, _TOLD, True)
