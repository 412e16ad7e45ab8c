"""Outside: a model in a process that does not serve yet. It holds no expert, and must not be called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from moe.comm import Peers
from moe.epoch import EMPTY
from placement import Placement, Plan

Build = Callable[[Peers, Plan], nn.Module]

OUTSIDE = Peers(group=None, rank=1, size=2)


class ReleasedError(RuntimeError):
    """A member that stood by is not wanted any more."""


@torch.inference_mode(False)
def built(build: Build, group: Peers, plan: Plan) -> nn.Module:
    """Its weights will change, which those made for inference alone do not like."""
    return build(group, plan)


def elsewhere(plan: Plan) -> Plan:
    """All experts on the other of two ranks."""
    tables = [np.stack([np.arange(p.num_experts), np.full(p.num_experts, EMPTY)]) for p in plan.placement_L]
    return Plan(placement_L=tuple(Placement(expert_RS=table) for table in tables), layer_L=plan.layer_L)
