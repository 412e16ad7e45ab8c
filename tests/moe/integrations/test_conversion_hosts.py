"""What was converted is loaded by stock layers of Megatron-Core and DeepSpeed, computes the same, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from moe import MoE, MoEConfig, World, export_safetensors
from moe.conversion import DeepSpeed, Megatron, Ours, convert, detect, verify
from routing import Score, Sigmoid, Softmax, Weigh
from tests.moe.integrations.conversion_hosts import DIM, EXPERTS, HIDDEN, LAYER, RANKS, deepspeed, megatron, tokens


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    """Two ranks of this module's own: they change torch.cuda for Megatron's sake."""
    with World(RANKS, timeout=timedelta(seconds=200)) as started:
        yield started


def our_layer(score: Score, shared: int, prices: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    config = MoEConfig(
        dim=DIM, hidden=HIDDEN, num_experts=EXPERTS, top_k=2, score=score, weigh=Weigh(normalize=True),
        shared_hidden=shared,
    )  # fmt: skip
    layer = MoE(config).eval()
    if prices:
        layer.router.price_E.copy_(torch.tensor([0.3, -0.1, 0.0, 0.05]))
    return nn.ModuleDict({str(LAYER): layer})


@pytest.mark.parametrize("style", ["sequential", "grouped"])
def test_megatrons_own_layer_computes_the_same_from_converted_weights(pair: World, style: str, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    net = our_layer(Sigmoid(), HIDDEN, prices=True)
    if style == "grouped":  # Megatron's runs in bf16 alone
        net.bfloat16()
    export_safetensors(net, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", of=Ours(), to=Megatron(ranks=RANKS, style=style))
    outs = pair.run(megatron, f"{tmp_path}/there", f"{tmp_path}/saved", style)
    for rank, out in enumerate(outs):
        with torch.no_grad():
            mine = net[str(LAYER)](tokens(rank).to(net[str(LAYER)].experts.up.dtype)).float()
        torch.testing.assert_close(out, mine, rtol=0, atol=2e-6 if style == "sequential" else 2e-2)
        assert mine.abs().max() > 0.05
    if style == "sequential":
        export_safetensors(nn.ModuleDict({"0": net[str(LAYER)]}), tmp_path / "first")
        for name, start in (("alone", "ours"), ("block", "first"), ("singleton", "ours")):
            folder = tmp_path / "distributed" / name
            found = detect(folder, "megatron")
            assert found.template == "decoder.layers.{layer}.mlp"
            assert verify(tmp_path / start, folder, of=Ours(), to=found) == ()
    saved = detect(tmp_path / "saved", "megatron")
    assert (saved.ranks, getattr(saved, "style", "")) == (RANKS, style)
    assert verify(tmp_path / "ours", tmp_path / "saved", of=Ours(), to=saved) == ()


def test_deepspeeds_own_engine_loads_what_was_converted_and_computes_the_same(pair: World, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    net = our_layer(Softmax(), 0, prices=False)
    names = nn.ModuleDict({"layers": net})
    export_safetensors(names, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", of=Ours(), to=DeepSpeed())
    outs = pair.run(deepspeed, f"{tmp_path}/there", f"{tmp_path}/saved")
    for rank, out in enumerate(outs):
        with torch.no_grad():
            mine = net[str(LAYER)](tokens(rank))
        torch.testing.assert_close(out, mine, rtol=0, atol=2e-6)
        assert mine.abs().max() > 0.02
    saved = detect(tmp_path / "saved", "deepspeed")
    assert saved.name == "DeepSpeed proj"
    assert verify(tmp_path / "ours", tmp_path / "saved", of=Ours(), to=saved) == ()
