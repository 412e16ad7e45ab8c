"""A checkpoint in another layout is the same checkpoint; what a conversion could do wrong is found and named."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from moe import MoE, MoEConfig, checkpoint, export_safetensors, import_safetensors
from moe.conversion import DeepSpeed, HuggingFace, Layout, Megatron, Ours, convert, detect, verify
from moe.conversion.cli import app
from moe.conversion.mapped import create_safetensors, map_safetensors
from moe.named import checksum

pytestmark = pytest.mark.fast
Tensors = dict[str, Tensor]


def bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits at all: NaNs, infinities and zeros of both signs among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def ours(folder: Path, tensors: Tensors) -> Path:
    """A checkpoint of ours, of these tensors."""
    folder.mkdir()
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name, target in create_safetensors(folder / "model.safetensors", specs).items():
        target.copy_(tensors[name])
    return folder


def layer(
    name: str, *, experts: int = 4, dim: int = 6, hidden: int = 4, gated: bool = True, bias: bool = False,
    shared: bool = False, priced: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Tensors:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    up = (hidden * (1 + gated), dim)
    tensors = {f"{name}.router.weight": bits((experts, dim), dtype, draw)}
    tensors[f"{name}.router.price_E"] = bits((experts,), torch.float32, draw) if priced else torch.zeros(experts)
    tensors[f"{name}.router.settled"] = torch.zeros((), dtype=torch.int64)
    for expert in range(experts):
        tensors[f"{name}.experts.{expert}.up"] = bits(up, dtype, draw)
        tensors[f"{name}.experts.{expert}.down"] = bits((dim, hidden), dtype, draw)
        if bias:
            tensors[f"{name}.experts.{expert}.up_bias"] = bits(up[:1], dtype, draw)
            tensors[f"{name}.experts.{expert}.down_bias"] = bits((dim,), dtype, draw)
    if shared:
        tensors[f"{name}.shared.up.weight"] = bits(up, dtype, draw)
        tensors[f"{name}.shared.down.weight"] = bits((dim, hidden), dtype, draw)
    return tensors


def model(**how: Any) -> Tensors:
    draw = torch.Generator().manual_seed(9)
    rest = {"embed.weight": bits((5, 3), torch.bfloat16, draw), "step": torch.tensor(7)}
    return layer("model.layers.2.mlp", seed=2, **how) | layer("model.layers.10.mlp", seed=10, **how) | rest


def files(folder: Path) -> dict[str, Any]:
    """Every tensor in every file, as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.name}:{key}": as_bytes(tensor) for key, tensor in map_safetensors(path).items()}
    for path in sorted(folder.rglob("*.pt")):
        content = torch.load(path, weights_only=True)
        content = content.get("model", content.get("module", content))
        tensors = {key: value for key, value in content.items() if value is not None}
        found |= {f"{path.relative_to(folder)}:{key}": as_bytes(tensor) for key, tensor in tensors.items()}
    return found


def as_bytes(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


@contextmanager
def somewhere() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def put(folder: Path, file: str, change: Callable[[Tensors], None]) -> None:
    """Changes the tensors of a file of torch.save."""
    (path,) = folder.rglob(file)
    content = torch.load(path, weights_only=True)
    change(content.get("model", content.get("module", content)))
    torch.save(content, path)


def planted(to: Layout, fault: Callable[[Path], object], **how: Any) -> tuple[str, ...]:
    """What verify says of a checkpoint that was converted well and then spoilt."""
    with somewhere() as folder:
        start = ours(folder / "start", model(**how))
        convert(start, folder / "a", of=Ours(), to=to)
        assert verify(start, folder / "a", of=Ours(), to=to) == ()
        fault(folder / "a")
        return verify(start, folder / "a", of=Ours(), to=to)


def key(expert: int, end: str, layer: int = 2) -> str:
    return f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_{end}.weight"


MEGATRON, RANK = Megatron(ranks=2), "mp_rank_00_00{}/model_optim_rng.pt"
IN_FILE = "decoder.layers.2.mlp: expert "


def test_an_expert_that_is_lost_is_named() -> None:
    def lose(tensors: Tensors) -> None:
        del tensors[key(1, "fc1")], tensors[key(1, "fc2")]

    said = planted(MEGATRON, lambda folder: put(folder, RANK.format(1), lose))
    assert f"{IN_FILE}3 is lost" in said
    said = planted(MEGATRON, lambda folder: put(folder, RANK.format(1), lambda t: t.pop(key(0, "fc2"))))
    assert f"{IN_FILE}2 down is lost" in said


def test_an_expert_that_is_doubled_is_named() -> None:
    def double(tensors: Tensors) -> None:
        tensors[key(0, "fc1")], tensors[key(0, "fc2")] = tensors[key(1, "fc1")], tensors[key(1, "fc2")]

    said = planted(MEGATRON, lambda folder: put(folder, RANK.format(1), double))
    assert said == (
        f"{IN_FILE}2 holds what expert 3 has in the source",
        "model.layers.2.mlp: what expert 3 has in the source is there 2 times",
        "model.layers.2.mlp: what expert 2 has in the source is nowhere",
    )


def test_an_expert_that_is_transposed_is_named() -> None:
    def flip(tensors: Tensors) -> None:
        tensors[key(0, "fc2")] = tensors[key(0, "fc2")].T.contiguous()

    for hidden in (4, 6):  # a square matrix too
        said = planted(MEGATRON, lambda folder: put(folder, RANK.format(0), flip), hidden=hidden)
        assert any(line.startswith(f"{IN_FILE}0 down is transposed") for line in said)

    def fold(tensors: Tensors) -> None:
        """The numbers in the order of the transpose, under the shape that was expected."""
        tensors[key(0, "fc2")] = tensors[key(0, "fc2")].T.reshape(tensors[key(0, "fc2")].shape)

    said = planted(MEGATRON, lambda folder: put(folder, RANK.format(0), fold))
    assert said == (f"{IN_FILE}0 down is transposed",)


def test_gate_and_up_in_each_others_place_are_named() -> None:
    def swap(tensors: Tensors) -> None:
        tensors[key(1, "fc1", 10)] = tensors[key(1, "fc1", 10)].roll(4, 0)

    said = planted(MEGATRON, lambda folder: put(folder, RANK.format(0), swap))
    assert said == (
        "decoder.layers.10.mlp: expert 1 gate holds up: gate and up are swapped",
        "decoder.layers.10.mlp: expert 1 up holds gate: gate and up are swapped",
    )


def test_gate_and_up_row_by_row_are_told_from_one_after_the_other() -> None:
    def weave(tensors: Tensors) -> None:
        gate, up = tensors[key(1, "fc1")].chunk(2)
        tensors[key(1, "fc1")] = torch.stack([gate, up], dim=1).flatten(0, 1)

    said = planted(MEGATRON, lambda folder: put(folder, RANK.format(0), weave))
    assert len(said) == 2
    assert all("row by row" in line for line in said)


def test_a_ranks_experts_under_another_ranks_numbers_are_named() -> None:
    def exchange(folder: Path) -> None:
        one, two = sorted(folder.rglob("mp_rank_*"))
        one.rename(folder / "x")
        two.rename(one)
        (folder / "x").rename(two)

    said = planted(MEGATRON, exchange)
    for expert, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
        assert f"{IN_FILE}{expert} holds what expert {other} has in the source" in said


def test_a_file_of_an_expert_under_another_experts_name_is_named() -> None:
    def rename(folder: Path) -> None:
        path = folder / "converted" / "layer_0_expert_1_mp_rank_00_model_states.pt"
        path.rename(path.with_name("layer_0_expert_3_mp_rank_00_model_states.pt"))

    said = planted(DeepSpeed(), rename)
    assert any("layer_0_expert_3_mp_rank_00_model_states.pt holds" in line and "expert 1" in line for line in said)
    assert any(line.endswith("model.layers.2.mlp: expert 3 is lost") for line in said)


def test_a_router_in_another_order_and_a_price_of_another_sign_are_named() -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["decoder.layers.2.mlp.router.weight"] = tensors["decoder.layers.2.mlp.router.weight"].flip(0)
        tensors["decoder.layers.2.mlp.router.expert_bias"] = -tensors["decoder.layers.2.mlp.router.expert_bias"]
        tensors["embed.weight"] = tensors["embed.weight"].flip(0)

    said = planted(Megatron(), lambda folder: put(folder, "model_optim_rng.pt", spoil))
    assert said == (
        "decoder.layers.2.mlp: price does not hold what the source has",
        "decoder.layers.2.mlp: router does not hold what the source has",
        "embed.weight does not hold what the source has",
    )


def test_ranks_that_differ_in_what_they_share_are_named() -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["decoder.layers.2.mlp.router.weight"].zero_()

    said = planted(MEGATRON, lambda folder: put(folder, RANK.format(1), spoil))
    assert any(line.endswith("decoder.layers.2.mlp: router differs from rank to rank") for line in said)


def test_a_layer_of_ours_goes_to_a_host_and_comes_home(tmp_path: Path) -> None:
    config = MoEConfig(dim=4, hidden=6, num_experts=4, top_k=2, shared_hidden=6)
    net, other = (torch.nn.ModuleDict({"3": MoE(config)}) for _ in range(2))
    export_safetensors(net, tmp_path / "a")
    checkpoint.save(tmp_path / "dcp", net)
    convert(tmp_path / "a", tmp_path / "b", of=Ours(), to=Megatron(ranks=2, style="grouped"))
    there = detect(tmp_path / "b", "megatron")
    assert there == Megatron(ranks=2, style="grouped")
    assert verify(tmp_path / "dcp", tmp_path / "b", of=Ours(), to=there) == (), "moe.checkpoint's folders are read too"
    convert(tmp_path / "b", tmp_path / "c", of=there, to=Ours(template="{layer}"))
    import_safetensors(other, tmp_path / "c")
    for (name, mine), its in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, its), name


def test_what_has_no_place_is_refused_or_said_and_never_dropped(tmp_path: Path) -> None:
    start = ours(tmp_path / "a", model() | {"model.layers.2.mlp.router.settled": torch.tensor(5)})
    with pytest.raises(ValueError, match=r"Hugging Face mixtral has no place for model\.layers\.2\.mlp: price"):
        convert(start, tmp_path / "b", of=Ours(), to=HuggingFace(family="mixtral"))
    done = convert(start, tmp_path / "b", of=Ours(), to=HuggingFace(family="deepseek_v3"), rest=False)
    assert done.left_out == ("model.layers.2.mlp: settled",)
    assert done.rest == 0
    with pytest.raises(ValueError, match="is there already"):
        convert(start, tmp_path / "b", of=Ours(), to=HuggingFace(family="deepseek_v3"))
    with pytest.raises(ValueError, match="has 4 experts; they cannot be dealt to 3 ranks alike"):
        convert(start, tmp_path / "c", of=Ours(), to=Megatron(ranks=3))
    with pytest.raises(ValueError, match="cannot be named"):
        convert(start, tmp_path / "c", of=Ours(), to=Megatron(template="mlp"))
    assert not (tmp_path / "c").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_source_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    tensors = model()
    del tensors["model.layers.2.mlp.experts.1.up"]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp: expert 1 (gate|up) is lost"):
        convert(ours(tmp_path / "a", tensors), tmp_path / "b", of=Ours(), to=Megatron())
    tensors = model()
    tensors["model.layers.2.mlp.experts.1.down"] = tensors["model.layers.2.mlp.experts.1.down"].T.contiguous()
    with pytest.raises(ValueError, match="expert 1 down is transposed: it has shape"):
        convert(ours(tmp_path / "c", tensors), tmp_path / "b", of=Ours(), to=Megatron())


def test_what_is_of_an_expert_and_not_known_is_refused(tmp_path: Path) -> None:
    scale = {"model.layers.2.mlp.experts.1.up_scale_inv": torch.ones(1)}
    with pytest.raises(ValueError, match="up_scale_inv is of an expert, and not known: is it quantized"):
        convert(ours(tmp_path / "a", model() | scale), tmp_path / "b", of=Ours(), to=Megatron())


def test_the_command_converts_checks_and_says_what_is_wrong(tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code, result.output

    start = str(ours(tmp_path / "a", model()))
    to_megatron = ("--from", "evenmoe", "--to", "megatron")
    code, said = run(start, f"{tmp_path}/b", *to_megatron, "--ranks", "2", "--json")
    assert code == 0
    facts = json.loads(said)
    assert facts["experts"] == 8
    assert facts["faults"] == []
    assert run(start, f"{tmp_path}/b", *to_megatron, "--check")[0] == 0
    put(tmp_path / "b", RANK.format(0), lambda t: t[key(0, "fc2")].zero_())
    code, said = run(start, f"{tmp_path}/b", *to_megatron, "--check")
    assert code == 1
    assert "expert 0 down does not hold what the source has" in said
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    code, said = run(start, f"{tmp_path}/h", "--from", "evenmoe", "--to", "hf", "--config", f"{tmp_path}/config.json")
    assert code == 0
    assert (tmp_path / "h" / "config.json").exists()
    assert run(start, f"{tmp_path}/x", "--from", "evenmoe", "--to", "hf")[0] == 2
    assert run(start, f"{tmp_path}/x", *to_megatron, "--config", start)[0] == 2
    assert run(start, f"{tmp_path}/x", "--from", "nowhere", "--to", "hf")[0] == 2
    assert run(f"{tmp_path}/none", f"{tmp_path}/x", *to_megatron)[0] == 2


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    start = ours(tmp_path / "a", model())
    whole = (start / "model.safetensors").read_bytes()
    for damaged in (b"", b"nothing of the kind", whole[:-3], whole[:40]):
        (start / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            detect(start, "evenmoe")
    for host, name in (("megatron", "mp_rank_00/model_optim_rng.pt"), ("deepspeed", "mp_rank_00_model_states.pt")):
        path = tmp_path / host / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match="torch does not read it"):
            detect(tmp_path / host, host)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (0, 2), ()], ids=str)
def test_a_checksum_is_of_the_numbers_and_not_of_how_they_lie_in_memory(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(6, 7)[tuple(slice(size) for size in shape)] if shape else torch.tensor(3.0)
    for view in (tensor, tensor.t() if shape else tensor):
        assert checksum(view) == checksum(view.clone(memory_format=torch.contiguous_format))
