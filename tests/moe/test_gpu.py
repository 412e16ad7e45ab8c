"""What only a GPU can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from moe import Fastest, Fused, MoE, MoEConfig, Planned
from moe.compute import Compute

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]
SETTINGS = MoEConfig(dim=64, hidden=128, num_experts=8, top_k=2, shared_hidden=64)


def layer_on(device: str, dtype: torch.dtype) -> MoE:
    torch.manual_seed(0)
    return MoE(SETTINGS).to(device, dtype)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.bfloat16, 3e-2)], ids=str)
def test_a_gpu_computes_what_a_cpu_does(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(96, 64, dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        layer, mine = layer_on(device, dtype), x.to(device).requires_grad_()
        y = layer(mine)
        y.float().square().sum().backward()
        grads = [mine.grad, *(parameter.grad for parameter in layer.parameters())]
        results.append([y.detach(), *(grad for grad in grads if grad is not None)])
    for host, device_ in zip(*results, strict=True):
        difference = (host.double() - device_.cpu().double()).abs().max()
        assert difference <= bound * host.double().abs().max().clamp(min=1)


@pytest.mark.filterwarnings("default")
def test_a_step_makes_the_host_wait_once() -> None:
    layer = layer_on("cuda", torch.bfloat16)
    x = torch.randn(96, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        layer(x).sum().backward()
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchroniz" in str(warning.message)]) <= 1


def planned_on(device: str, compute: Compute) -> Planned:
    torch.manual_seed(0)
    return Planned(replace(SETTINGS, compute=compute)).to(device, torch.bfloat16)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("compute", [Fastest(), Fused()], ids=str)
def test_a_planned_step_never_makes_the_host_wait(compute: Compute) -> None:
    layer = planned_on("cuda", compute)
    x = torch.randn(96, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layer.check()


@pytest.mark.parametrize("compute", [Fastest(), Fused()], ids=str)
def test_a_captured_planned_step_is_the_step_on_other_tokens_too(compute: Compute) -> None:
    layer = planned_on("cuda", compute)
    x = torch.randn(96, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(layer(x).float().square().sum(), [x, *layer.experts.parameters()])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(layer(x).float().square().sum(), [x, *layer.experts.parameters()])
    with torch.no_grad():
        x.copy_(torch.randn_like(x) + 1)
    graph.replay()
    torch.cuda.synchronize()
    eager = torch.autograd.grad(layer(x).float().square().sum(), [x, *layer.experts.parameters()])
    for got, want in zip(captured, eager, strict=True):
        assert (got - want).abs().max() <= 2e-2 * want.abs().max()
    layer.check()
