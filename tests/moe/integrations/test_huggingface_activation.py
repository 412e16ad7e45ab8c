"""A host's experts that are silu(gate) * up run as ours do, on the compiled path too; others keep the host's gate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from transformers.integrations.moe import use_experts_implementation

from moe import SwiGLU
from moe.blocks import Blocks
from moe.integrations.huggingface import parallelize_experts
from moe.integrations.huggingface.experts import Host, HostGate
from tests.moe.integrations.tiny import FAMILIES, host_name, layers_of, make, prompt
from tests.world import relative

OWN_GATE = {"gpt_oss", "nemotron_h"}  # clamped and interleaved; relu squared, without a gate


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_silu_gate_is_ours_and_any_other_stays_the_hosts(family: str) -> None:
    model = parallelize_experts(make(family))
    for layer in layers_of(model):
        wanted = HostGate if family in OWN_GATE else SwiGLU
        assert type(layer.experts.activation) is type(layer.config.activation) is wanted


@pytest.mark.parametrize("change", ["another function", "a gate of its own", "a subclass of silu"])
def test_what_is_not_sure_to_be_a_silu_gate_stays_the_hosts(change: str) -> None:
    class Odd(nn.SiLU): ...

    model = make("mixtral", hidden_act="gelu") if change == "another function" else make("mixtral")
    for _, host in hosts_of(model):
        if change == "a gate of its own":
            host._apply_gate = lambda h: h[..., ::2] * h[..., 1::2]
        if change == "a subclass of silu":
            host.act_fn = Odd()
        assert isinstance(Host(host).activation, HostGate)
    if change != "a gate of its own":  # which transformers' loop over experts does not ask
        reference = copy.deepcopy(model)
        x = prompt(0)
        assert relative(parallelize_experts(model)(x).logits, reference(x).logits) < 1e-9


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_spread_model_takes_the_compiled_path_and_is_the_model_it_was(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(Blocks, name, counted(getattr(Blocks, name), name, taken))
    reference = make(family, torch.float32)
    model = parallelize_experts(copy.deepcopy(reference))
    x = prompt(1)
    want, got = reference(x, labels=x), model(x, labels=x)
    want.loss.backward()
    got.loss.backward()
    layers = len(layers_of(model))
    assert taken == ["forward"] * layers + ["backward"] * layers
    assert relative(got.logits.detach(), want.logits.detach()) < 1e-5
    grads = {name: weight.grad for name, weight in reference.named_parameters()}
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        other = grads[host_name(name)]
        assert other is not None
        whole = other[list(layers_of(model)[0].experts.expert_ids)] if ".experts." in name else other
        assert relative(weight.grad, whole) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_that_are_stored_transposed_are_the_hosts_too(dtype: torch.dtype) -> None:
    """No family of the list is both transposed and plain silu; the marking allows it."""
    torch.manual_seed(0)
    block = Block(dtype)
    reference = copy.deepcopy(block)
    model = parallelize_experts(block)
    assert isinstance(model.experts.experts.activation, SwiGLU)
    x_TD = torch.randn(12, 16, dtype=dtype)
    want, got = reference(x_TD), model(x_TD)
    want.square().sum().backward()
    got.square().sum().backward()
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative(got.detach(), want.detach()) < close
    for name in ("gate_up_proj", "down_proj"):
        whole = getattr(reference.experts, name).grad[list(model.experts.experts.expert_ids)]
        assert relative(model.experts.experts.get_parameter(name).grad, whole) < close


@use_experts_implementation(is_transposed=True)
class Turned(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 4, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y_TD = torch.zeros_like(hidden_states)
        for token, chosen in enumerate(top_k_index.tolist()):
            for place, expert in enumerate(chosen):
                gate, up = (hidden_states[token] @ self.gate_up_proj[expert]).chunk(2)
                y_TD[token] += weights[token, place] * ((self.act_fn(gate) * up) @ self.down_proj[expert])
        return y_TD


class Block(nn.Module):
    top_k = 2

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        config = type("Config", (), {"_experts_implementation": "eager"})()
        self.experts = Turned(config).to(dtype)
        self.gate = nn.Linear(16, 4, dtype=dtype)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        weight_TK, expert_TK = self.gate(x_TD).softmax(dim=-1).topk(2)
        y_TD: torch.Tensor = self.experts(x_TD, expert_TK, weight_TK)
        return y_TD


def hosts_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]


def counted(method: Any, name: str, taken: list[str]) -> Any:
    def call(self: Blocks, *args: Any, **kwargs: Any) -> Any:
        taken.append(name)
        return method(self, *args, **kwargs)

    return call
