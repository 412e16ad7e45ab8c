"""A checkpoint of the host is read expert by expert and written so that the host reads it to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from transformers import AutoModelForCausalLM

from moe import World
from moe.comm import Peers, world_group
from moe.integrations.huggingface import Tally, load_pretrained, parallelize_experts, save_pretrained
from placement import Placement
from routing import LeastLoaded, LossFree
from tests.moe.integrations.tiny import FAMILIES, layers_of, make, prompt

Worlds = Callable[[int], World]
COPIES = Placement(expert_RS=torch.tensor([[5, 0, 2, 3], [1, 4, 0, -1]]).numpy())


def keep(family: str, folder: Path, **more: Any) -> Any:
    model = make(family, torch.float32, **more)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def read_and_write(family: str, source: str, target: str, placement: Placement | None) -> tuple[float, Tally, int]:
    """-> how far the logits are from those of `from_pretrained`, what was read, and the bytes of this rank's experts"""
    tally = Tally()
    model = load_pretrained(source, world_group(), placement=placement, assigner=LeastLoaded(), tally=tally)
    whole = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    x = prompt(Peers.of(world_group()).rank)
    with torch.no_grad():
        error = float((model(x).logits - whole(x).logits).abs().max())
    save_pretrained(model, target)
    own = sum(weight.nbytes for layer in layers_of(model) for weight in layer.experts.parameters())
    return error, tally, own


def same(folder: Path, other: Path) -> bool:
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_reads_its_own_experts_and_the_host_reads_what_they_write(
    world: Worlds, family: str, tmp_path: Path
) -> None:
    model = keep(family, tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1, "the checkpoint is in shards"
    answers = world(2).run(read_and_write, family, str(tmp_path / "a"), str(tmp_path / "b"), None)
    total = sum(weight.nbytes for weight in model.state_dict().values())
    experts = sum(own for _, _, own in answers)
    tied = model.lm_head.weight.nbytes if model.config.tie_word_embeddings else 0
    for error, tally, own in answers:
        assert error < 1e-5
        assert tally.read == total - tied - experts + own, "what is not an expert, and the experts that live here"
        assert tally.held >= total - tied
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_copies_and_experts_out_of_order_are_written_once_and_in_order(
    world: Worlds, family: str, tmp_path: Path
) -> None:
    keep(family, tmp_path / "a")
    for error, _, _ in world(2).run(read_and_write, family, str(tmp_path / "a"), str(tmp_path / "b"), COPIES):
        assert error < 1e-5
    assert same(tmp_path / "a", tmp_path / "b")


def test_ranks_without_experts_read_and_write_too(world: Worlds, tmp_path: Path) -> None:
    placement = Placement(expert_RS=torch.tensor([list(range(6)), [-1] * 6]).numpy())
    keep("mixtral", tmp_path / "a")
    for error, _, _ in world(2).run(read_and_write, "mixtral", str(tmp_path / "a"), str(tmp_path / "b"), placement):
        assert error < 1e-5
    assert same(tmp_path / "a", tmp_path / "b")


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    keep("mixtral", tmp_path / "a", tie_word_embeddings=True)
    model = load_pretrained(tmp_path / "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_pretrained(model, tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


def test_a_model_that_was_trained_is_saved_as_it_is_now(tmp_path: Path) -> None:
    model = parallelize_experts(make("deepseek_v3", torch.float32))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        x = prompt(seed)
        model(x, labels=x).loss.backward()
        optimiser.step()
        save_pretrained(model, tmp_path / "a")
    x = prompt(3)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", experts_implementation="eager")(x).logits
        torch.testing.assert_close(again, model.eval()(x).logits)


def test_prices_are_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    model = parallelize_experts(make("mixtral", torch.float32), balancer=LossFree(step=0.01))
    layers_of(model)[1].router.price_E[2] = 0.25
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path, balancer=LossFree(step=0.01))
    assert layers_of(again)[1].router.price_E.tolist() == [0, 0, 0.25, 0, 0, 0]
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_in_bf16_is_loaded_in_bf16_or_as_asked(tmp_path: Path) -> None:
    make("deepseek_v3", torch.bfloat16).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def refuse(folder: str) -> str:
    model = parallelize_experts(make("mixtral"), world_group())
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        return str(error)
    return ""


def test_the_hosts_own_way_of_saving_is_refused_where_it_would_lose_experts(world: Worlds, tmp_path: Path) -> None:
    assert "huggingface.save_pretrained(model, folder)" in world(2).run(refuse, str(tmp_path))[0]


def test_a_folder_that_holds_no_checkpoint_or_too_little_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model.safetensors.index.json nor model.safetensors"):
        load_pretrained(tmp_path)
    model = make("mixtral", torch.float32)
    state = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.experts" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 2 weights of MixtralForCausalLM, the first model.layers.1.mlp.exp"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not spread; use its own save_pretrained"):
        save_pretrained(model, tmp_path)
