"""MoEConfig: what a layer is, as a value. Change one with dataclasses.replace."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

from moe.activation import Activation, SwiGLU
from moe.compute import Compute, Fastest
from moe.guests import Invite, KeepGuests
from routing import (
    Assigner,
    AtHome,
    Balancer,
    Drop,
    Dropless,
    Loss,
    Score,
    Select,
    Softmax,
    Sparsify,
    TopK,
    Unpriced,
    Weigh,
    check_routing,
)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """dim: model width. hidden: width of each expert. shared_hidden: width of the shared expert; 0 means none.

    top_k: a number, or a schedule of it by step and layer, this one being `layer`. losses: balancing losses, to be
    charged with the model's own (see `charge`).
    """

    dim: int
    hidden: int
    num_experts: int
    top_k: int | Sparsify
    score: Score = Softmax()
    select: Select = TopK()
    weigh: Weigh = Weigh()
    balancer: Balancer = Unpriced()
    losses: tuple[Loss, ...] = ()
    drop: Drop = Dropless()
    jitter: float = 0.0
    layer: int = 0
    assigner: Assigner = AtHome()
    activation: Activation = SwiGLU()
    bias: bool = False
    shared_hidden: int = 0
    compute: Compute = Fastest()
    guests: Invite = KeepGuests()

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "num_experts"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}; use at least 1")
        if self.shared_hidden < 0:
            raise ValueError(f"shared_hidden={self.shared_hidden}; use the shared expert's width, or 0 for none")
        if not isinstance(self.top_k, int | Sparsify):
            raise ValueError(f"top_k={self.top_k!r}; use a whole number, or Sparsify(...)")
        for field in fields(self):
            policy, usual = getattr(self, field.name), field.default
            usable = hasattr(policy, "quote") if field.name == "balancer" else callable(policy)
            if is_dataclass(usual) and (isinstance(policy, type) or not usable):
                raise ValueError(f"{field.name}={policy!r} is no policy; use an object, such as {usual!r}")
        check_routing(self.num_experts, self.top_k, self.layer, self.select, self.balancer, self.jitter)
