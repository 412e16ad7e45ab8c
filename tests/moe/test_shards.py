"""Weights as safetensors: out of any number of ranks, into any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe import export_safetensors, import_safetensors
from tests.moe.test_checkpoint import (
    COPIES,
    Net,
    Worlds,
    assert_same,
    optimizer_of,
    reversed_on,
    together,
    train,
    whole,
)


def weights(net: Net) -> dict[str, Any]:
    return whole(net, optimizer_of(net))


def _export(folder: str) -> dict[str, Any]:
    net = Net(placement=COPIES)
    train(net, optimizer_of(net), range(2))
    export_safetensors(net, folder)
    return weights(net)


def _import(folder: str) -> dict[str, Any]:
    net = Net(placement=reversed_on(3))
    with torch.no_grad():
        for weight in net.parameters():
            weight.fill_(7.0)
    import_safetensors(net, folder)
    return weights(net)


def test_any_number_of_ranks_reads_what_any_number_wrote(world: Worlds, tmp_path: Path) -> None:
    wanted = together(world(4).run(_export, f"{tmp_path}/x"))
    assert_same(together(world(3).run(_import, f"{tmp_path}/x")), wanted)
    net = Net()
    import_safetensors(net, tmp_path / "x")
    assert_same(weights(net), wanted)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(set(index["weight_map"]))
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "x" / file)
    assert "first.experts.5.up" in index["weight_map"]


@pytest.mark.fast
def test_missing_doubled_and_transposed_experts_are_named_and_nothing_is_changed(tmp_path: Path) -> None:
    net, other = Net(), Net()
    export_safetensors(net, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    with torch.no_grad():
        other.middle.weight.fill_(3.0)
    before = weights(other)
    name = "last.experts.2.down"
    for spoilt, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"{name} is missing"),
        (
            tensors | {name: tensors[name].T.contiguous()},
            f"{name} has shape [4, 6], the model's has [6, 4]: it is trans",
        ),
    ):
        save_file(spoilt, file)
        with pytest.raises(ValueError) as error:
            import_safetensors(other, tmp_path)
        assert message in str(error.value)
    save_file(tensors, file)
    save_file({name: tensors[name]}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is in model-00001-of-00001\.safetensors and in more\.safetensors"):
        import_safetensors(other, tmp_path)
    with pytest.raises(ValueError, match="holds an export already"):
        export_safetensors(net, tmp_path)
    with pytest.raises(ValueError, match=r"no \.safetensors file is there"):
        import_safetensors(net, tmp_path / "nowhere")
    (tmp_path / "more.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"more\.safetensors is damaged"):
        import_safetensors(other, tmp_path)
    assert_same(weights(other), before)
