"""The table of families says what transformers' own conversion says, and transformers reads what we write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from transformers import AutoModelForCausalLM

from moe import MoE, MoEConfig, import_safetensors
from moe.conversion import HuggingFace, Megatron, Ours, convert, detect, verify
from moe.conversion.convert import read
from moe.conversion.huggingface import FAMILIES
from moe.conversion.place import Piece
from moe.integrations.huggingface import find_blocks
from moe.integrations.huggingface.experts import layout, names_of
from routing import Weigh
from tests.moe.integrations.tiny import FAMILIES as TINY
from tests.moe.integrations.tiny import make, prompt

# llama4's experts are stacks that transformers does not mark; the others are all that is marked and in the table.
MARKED = sorted(FAMILIES.keys() - {"llama4_text"})


def test_every_family_is_made_here() -> None:
    assert set(MARKED) == TINY.keys()


@pytest.mark.parametrize("family", MARKED)
def test_a_piece_is_what_transformers_makes_of_it(family: str, tmp_path: Path) -> None:
    model = make(family, torch.float32)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    of = detect(tmp_path / "a", "hf")
    assert of == HuggingFace(family=family)
    contents = read(tmp_path / "a", of)
    blocks = find_blocks(model)
    assert len(contents.layers) == len(blocks)
    for name, (_, block, host) in zip(contents.layers, blocks, strict=True):
        stack = layout({field: host.get_parameter(leaf) for field, leaf in names_of(host).items()}, host.is_transposed)
        for expert in range(len(stack.up)):
            for part, half in (("gate", 0), ("up", 1)):
                if host.has_gate:
                    of_host = _half(host, stack.up[expert], half)
                    assert torch.equal(contents.pieces[Piece(name, expert, part)].read(), of_host), (expert, part)
                    if stack.up_bias is not None:
                        of_host = _half(host, stack.up_bias[expert], half)
                        assert torch.equal(contents.pieces[Piece(name, expert, f"{part}_bias")].read(), of_host)
            assert torch.equal(contents.pieces[Piece(name, expert, "down")].read(), stack.down[expert])
        bias = [value for leaf, value in block.state_dict().items() if leaf.endswith("e_score_correction_bias")]
        priced = Piece(name, None, "price") in contents.pieces
        assert priced == bool(bias)
        if priced:
            assert torch.equal(contents.pieces[Piece(name, None, "price")].read(), -bias[0].reshape(-1))


def _half(host: Any, both: Tensor, half: int) -> Tensor:
    """The rows of `both` that the host's own gate uses as gate (0) or up (1): found by asking it."""
    rows = len(both)
    probe = torch.ones(1, rows, dtype=torch.float64)
    quiet = []
    for row in range(rows):
        one = probe.clone()
        one[0, row] = 1.5
        quiet.append((host._apply_gate(one) - host._apply_gate(probe)).abs().sum(0).argmax().item())
    by_column: dict[int, list[int]] = {}
    for row, column in enumerate(quiet):
        by_column.setdefault(int(column), []).append(row)
    pairs = [by_column[column] for column in range(rows // 2)]
    # Up enters linearly, the gate through its activation: twice the step is twice the change for up alone.
    order = []
    for column, (first, second) in enumerate(pairs):
        changes = []
        for step in (0.25, 0.5):
            one = probe.clone()
            one[0, first] += step
            changes.append(float((host._apply_gate(one) - host._apply_gate(probe))[0, column]))
        order.append((second, first) if abs(changes[1] - 2 * changes[0]) < 1e-9 else (first, second))
    return both[[pair[half] for pair in order]]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "granitemoe"])
def test_transformers_reads_what_came_back_from_another_layout(family: str, tmp_path: Path) -> None:
    model = make(family, torch.float32)
    model.save_pretrained(tmp_path / "a")
    of = detect(tmp_path / "a", "hf")
    convert(tmp_path / "a", tmp_path / "b", of=of, to=Megatron(ranks=3))
    config = f"{tmp_path}/a/config.json"
    convert(tmp_path / "b", tmp_path / "c", of=Megatron(ranks=3), to=HuggingFace(family=family, config=config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "c", experts_implementation="eager")
    assert verify(tmp_path / "a", tmp_path / "c", of=of, to=of) == ()
    with torch.no_grad():
        assert torch.equal(again(prompt(0)).logits, model(prompt(0)).logits)


def test_our_layer_computes_what_mixtrals_block_does(tmp_path: Path) -> None:
    model = make("mixtral", torch.float32)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", of=HuggingFace(family="mixtral"), to=Ours(template="{layer}"), rest=False)
    config = MoEConfig(dim=16, hidden=24, num_experts=6, top_k=2, weigh=Weigh(normalize=True))
    layers = nn.ModuleDict({"0": MoE(config), "1": MoE(config)}).eval()
    import_safetensors(layers, tmp_path / "b")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        for number, layer in layers.items():
            torch.testing.assert_close(layer(x), model.model.layers[int(number)].mlp(x), rtol=1e-5, atol=1e-6)
