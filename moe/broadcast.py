"""What DistributedDataParallel must not broadcast: before a forward it gives every rank the buffers of the first.

It may be told beforehand, by `leave_experts_alone`. If it was not, the first forward inside it tells it: by then it has
overwritten nothing but zeros, and nobody's statistics are lost in a step of several forwards. For the experts that is
too late: made without being told, it has given every rank those of its first.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe.census import Pool
from moe.comm import Peers
from moe.experts import Experts
from routing import Router

_TOLD = "_evenmoe_told"


def buffers_of_a_rank(model: nn.Module) -> Iterator[str]:
    """The buffers that hold what this rank has seen, by name."""
    for prefix, module in model.named_modules():
        if isinstance(module, Router | Pool):
            yield from (f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers() if name != "price_E")


def keep_from_broadcast(peers: Peers) -> None:
    """Within a forward: tell the DistributedDataParallel that runs it, if any, once. peers: those of its layers."""
    ddp = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if ddp is not None and not hasattr(ddp, _TOLD):
        _refuse_equal_experts(ddp, peers)
        ddp.parameters_to_ignore.update(buffers_of_a_rank(ddp.module))
        setattr(ddp, _TOLD, True)


def _refuse_equal_experts(ddp: DistributedDataParallel, peers: Peers) -> None:
    """On ranks that hold the same experts DDP is right to make them equal, and to average their gradients."""
    weights = (
        weight for module in ddp.module.modules() if isinstance(module, Experts) for weight in module.parameters()
    )
    of_experts = {id(weight) for weight in weights}
    taken = [
        name
        for name, weight in ddp.module.named_parameters()
        if id(weight) in of_experts and name not in ddp.parameters_to_ignore
    ]
    if taken and peers.meet(ddp.process_group):
        raise ValueError(
            f"DistributedDataParallel took {taken[0]!r} for a parameter that all ranks share: every rank now has the "
            f"experts of its first; build the model again and wrap leave_experts_alone(model)"
        )
