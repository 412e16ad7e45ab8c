"""MoEConfig: what a layer is, as a value. Change one with dataclasses.replace."""

from __future__ import annotations

from dataclasses import dataclass

from moe.experts import Activation, Compute, Fastest, SwiGLU
from routing import Assigner, AtHome, Balancer, Score, Select, Softmax, TopK, Unpriced, Weigh


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """dim: model width. hidden: width of each expert. shared_hidden: width of the shared expert; 0 means none."""

    dim: int
    hidden: int
    num_experts: int
    top_k: int
    score: Score = Softmax()
    select: Select = TopK()
    weigh: Weigh = Weigh()
    balancer: Balancer = Unpriced()
    assigner: Assigner = AtHome()
    activation: Activation = SwiGLU()
    bias: bool = False
    shared_hidden: int = 0
    compute: Compute = Fastest()

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "num_experts", "top_k"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}; use at least 1")
        if self.shared_hidden < 0:
            raise ValueError(f"shared_hidden={self.shared_hidden}; use the shared expert's width, or 0 for none")
        self.select.check(self.num_experts, self.top_k)
