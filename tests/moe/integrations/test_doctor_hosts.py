"""moe-doctor on routers of Megatron-Core and DeepSpeed, each in a process that has a group of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from moe import World
from moe.doctor import doctor

DIM, EXPERTS = 16, 4


class Model(nn.Module):
    """A router and a head. score(x) -> a table for the head"""

    def __init__(self, router: Any, score: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.score, self.head = router, score, nn.Linear(EXPERTS, 8)
        self.aux = torch.zeros(())

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.score(self, x))  # type: ignore[no-any-return]


def found(model: Model, *, steps: int = 4, mask: Tensor | None = None, loss_of: Any, after: Any = None) -> set[str]:
    optimizer = SGD(model.parameters(), lr=0.01)
    with doctor(model) as report:
        for _ in range(steps):
            loss_of(model, model(torch.randn(8, 4, DIM) + 0.5, attention_mask=mask)).backward()
            if after is not None:
                after(model.router)
            optimizer.step()
            optimizer.zero_grad()
    assert "gating" not in vars(model.router)
    return {symptom.name for symptom in report.report.symptoms}


def of_megatron() -> list[set[str]]:
    """Its expert bias: updated, forgotten, and padding counted; tokens are [S, B]."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    with (
        patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        patch.object(moe_utils, "te_general_gemm", None, create=True),
    ):
        parallel_state.initialize_model_parallel()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        config = TransformerConfig(
            num_layers=1, hidden_size=DIM, num_attention_heads=2, num_moe_experts=EXPERTS, moe_router_topk=2,
            moe_router_load_balancing_type="none", moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True, moe_router_bias_update_rate=1e-2, add_bias_linear=False,
        )  # fmt: skip

        def model() -> Model:
            torch.manual_seed(0)
            router = TopKRouter(config=config, pg_collection=groups)
            router.set_layer_number(1)
            nn.init.normal_(router.weight, std=0.3)
            router.weight.data[0] += 0.1  # somewhat hot
            return Model(router, lambda model, x: model.router(x)[0])

        def update(router: Any) -> None:
            counts = router.local_tokens_per_expert
            router.expert_bias.copy_(moe_utils.get_updated_expert_bias(counts, router.expert_bias, 1e-2))
            counts.zero_()

        def square(model: Model, y: Tensor) -> Tensor:
            return y.square().mean()

        padded = torch.ones(4, 8)
        padded[:, 6:] = 0
        return [
            found(model(), loss_of=square, after=update, mask=torch.ones(4, 8)),
            found(model(), loss_of=square),
            found(model(), loss_of=square, after=update, mask=padded),
        ]


def of_deepspeed() -> list[set[str]]:
    """Its balancing loss: added, and left lying."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.moe.sharded_moe import TopKGate

    def score(model: Model, x: Tensor) -> Tensor:
        model.aux, combine, _, _ = model.router(x.reshape(-1, DIM))
        return combine.sum(dim=-1)  # type: ignore[no-any-return]

    def model() -> Model:
        torch.manual_seed(0)
        return Model(TopKGate(DIM, EXPERTS, k=2, min_capacity=0, capacity_factor=2.0), score)

    return [
        found(model(), loss_of=lambda model, y: y.square().mean() + 0.01 * model.aux),
        found(model(), loss_of=lambda model, y: y.square().mean()),
    ]


def alone(function: Callable[[], list[set[str]]]) -> list[set[str]]:
    with World(1, timeout=timedelta(seconds=150)) as one:  # it imports much
        return one.run(function)[0]  # type: ignore[no-any-return]


def test_a_megatron_router_is_clean_and_its_traps_are_found() -> None:
    if find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed; pip install megatron-core")
    assert alone(of_megatron) == [set(), {"balancer-dead"}, {"padding-counted"}]


def test_a_deepspeed_gate_is_clean_and_a_loss_left_lying_is_found() -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; DS_BUILD_OPS=0 pip install deepspeed")
    assert alone(of_deepspeed) == [set(), {"aux-loss-detached"}]
