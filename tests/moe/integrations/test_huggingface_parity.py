"""The parity harness over blocks of the host: one process or three, on the batches that break layers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from moe import assert_ep_parity
from moe.integrations.huggingface import parallelize_experts
from routing import LeastLoaded
from tests.moe.integrations.tiny import make


class Blocks(nn.Module):
    """The MoE blocks of three families, one after the other: seven experts, which three ranks cannot share evenly."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        more = {"num_local_experts": 7, "n_routed_experts": 7, "n_group": 1, "num_hidden_layers": 1}
        models = [
            make("mixtral", **more),
            make("deepseek_v3", **more, first_k_dense_replace=0),
            make("gpt_oss", **more),
        ]
        self.blocks = nn.ModuleList(model.model.layers[0].mlp for model in models)
        parallelize_experts(self, group, assigner=LeastLoaded(headroom=1.0, min_chunk=1))

    def forward(self, x_TD: Tensor) -> Tensor:
        x = x_TD[None]
        for block in self.blocks:
            y = block(x)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x[0]


def test_blocks_of_the_host_are_the_same_on_one_rank_and_on_three() -> None:
    # 1e-6, as the hosts compute logits in fp32, and not the same to the bit in a batch of another size
    assert_ep_parity(Blocks, dim=16, ranks=(3,), tolerance=1e-6, timeout=timedelta(seconds=200))
