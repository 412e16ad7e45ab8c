"""Census: what all ranks and micro-batches of a step choose together, for losses that are pooled over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe.comm import EVERYONE, Everyone, Group, Peers, sum_over


class Pool(nn.Module):
    """One layer's loads in a step. Counted as its micro-batches pass, or all of them beforehand, by a census.

    While it is empty nobody reads load_E, which may hold anything, or nothing, after `to_empty`.
    """

    load_E: Tensor
    empty: bool
    counting: bool
    counted: bool

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("load_E", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)
        self.reset()

    def take(self, own_E: Tensor, group_E: Tensor) -> Tensor:
        """What is known of the step with this batch in it. own_E: its loads here, group_E: on all the layer's ranks."""
        if not self.counted:
            batch_E = own_E if self.counting else group_E
            self.load_E = batch_E.clone() if self.empty else self.load_E + batch_E
            self.empty = False
        return self.load_E

    def reset(self) -> None:
        self.empty = True
        self.counting = self.counted = False


@contextmanager
def census(model: nn.Module, group: Group | Everyone = EVERYONE) -> Iterator[None]:
    """Within it, run the model on every micro-batch of the step to come, as it is: nothing is learnt, nothing observed.

        with census(model):
            for batch in step:
                model(batch)

    Afterwards GlobalLoss knows the loads of the whole step, over the ranks of the group, until the prices are settled.
    Random numbers are drawn again from where they were, so that the step itself makes the same choices.
    """
    pools = [module for module in model.modules() if isinstance(module, Pool)]
    devices = {pool.load_E.device for pool in pools if pool.load_E.is_cuda}
    for pool in pools:
        pool.reset()
        pool.counting = True
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]), torch.no_grad():
            yield
        for pool in pools:
            if pool.empty:
                pool.load_E.zero_()
        sum_over([pool.load_E for pool in pools], Peers.of(group))
    except BaseException:
        for pool in pools:
            pool.reset()
        raise
    for pool in pools:
        pool.empty, pool.counting, pool.counted = False, False, True
