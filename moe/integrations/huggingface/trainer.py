"""What transformers' Trainer must do between backward and the optimiser, once the experts of its model are spread."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from moe.clip import clip_grad_norm
from moe.comm import EVERYONE, Everyone, Group, Peers
from moe.data_parallel import average_expert_grads
from moe.prices import settle_prices


class ExpertGradients(TrainerCallback):  # type: ignore[misc]
    """Averages what DDP leaves alone, clips with each expert counted once, and settles the prices, at every step.

        parallelize_experts(model, group)
        Trainer(leave_experts_alone(model), TrainingArguments(..., max_grad_norm=0), callbacks=[ExpertGradients()])

    data_parallel, replicas: as in `average_expert_grads`. max_norm: 0 for no clipping. Trainer itself must not clip: on
    each rank it knows the experts of that rank alone, so every rank would clip differently.
    """

    def __init__(
        self, data_parallel: Group | Everyone = EVERYONE, replicas: Group = None, *, max_norm: float = 0.0
    ) -> None:
        self.data_parallel, self.replicas, self.max_norm = data_parallel, replicas, max_norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if args.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} would clip every rank by the norm of its own experts; use "
                f"TrainingArguments(max_grad_norm=0) and ExpertGradients(max_norm={args.max_grad_norm})"
            )
        if args.fp16 and Peers.of(self.data_parallel).size > 1:
            raise ValueError(
                "with fp16=True Trainer's scaler skips a step on the rank whose experts overflow, and on no other: the "
                "ranks would drift apart; use TrainingArguments(bf16=True)"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **rest: Any) -> None:
        average_expert_grads(model, Peers.of(self.data_parallel).group, self.replicas)
        if self.max_norm > 0:
            clip_grad_norm(model, self.max_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **rest: Any) -> None:
        settle_prices(model, self.data_parallel)
