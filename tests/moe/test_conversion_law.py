"""From any layout to any other and back is the same checkpoint, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.conversion import DeepSpeed, HuggingFace, Layout, Megatron, Ours, convert, detect, verify
from moe.conversion.huggingface import FAMILIES
from moe.conversion.mapped import map_safetensors
from tests.moe.test_conversion import Tensors, as_bytes, files, model, ours, somewhere

HOST = {Ours: "evenmoe", HuggingFace: "hf", Megatron: "megatron", DeepSpeed: "deepspeed"}
HF = {
    "mixtral": {"priced": False},
    "minimax_m2": {},
    "qwen2_moe": {"priced": False, "shared": True},
    "deepseek_v2": {"priced": False, "shared": True},
    "deepseek_v3": {"shared": True},
    "ernie4_5_moe": {"shared": True},
    "jamba": {"priced": False},
    "nemotron_h": {"gated": False, "shared": True},
    "gpt_oss": {"priced": False, "bias": True},
    "llama4_text": {"priced": False, "shared": True},
    "granitemoe": {"priced": False},
}


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Tensors, Layout, Layout]:
    """(a model, two layouts that have a place for all of it)"""
    family = draw(st.sampled_from([*HF, "none"]))
    free = {key: draw(st.booleans()) for key in ("gated", "bias", "shared", "priced")}
    how = {"gated": True, "bias": False, "shared": False, "priced": True} | HF[family] if family != "none" else free
    ranks = draw(st.sampled_from([1, 2, 4]))
    styles = ["sequential", "te-grouped"] if how["bias"] else ["sequential", "te-grouped", "grouped"]
    layouts: list[Layout] = [
        Ours(template=draw(st.sampled_from(["", "b.{layer}.moe"])), shard_bytes=draw(st.sampled_from([1, 300, 2**20]))),
        Megatron(ranks=ranks, style=draw(st.sampled_from(styles))),
        DeepSpeed(style=draw(st.sampled_from(["proj", "fc", "evenmoe"]))),
    ]
    if family != "none":
        layouts.append(HuggingFace(family=family, shard_bytes=draw(st.sampled_from([1, 2**20]))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn]))
    tensors = model(experts=4, dim=draw(st.integers(1, 5)), hidden=draw(st.integers(1, 4)), dtype=dtype, **how)
    return tensors, draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))


def style_of(layout: Layout) -> str:
    return getattr(layout, "style", "")


@settings(max_examples=50, deadline=None)
@given(journeys())
def test_there_and_back_is_the_same_checkpoint_bit_for_bit(journey: tuple[Tensors, Layout, Layout]) -> None:
    tensors, first, second = journey
    with somewhere() as folder:
        start = ours(folder / "start", tensors)
        convert(start, folder / "a", of=Ours(), to=first)
        there = detect(folder / "a", HOST[type(first)], family=getattr(first, "family", ""), style=style_of(first))
        convert(folder / "a", folder / "b", of=there, to=second)
        back = detect(folder / "b", HOST[type(second)], family=getattr(second, "family", ""), style=style_of(second))
        assert verify(start, folder / "b", of=Ours(), to=back) == ()
        again = replace(there, shard_bytes=first.shard_bytes) if hasattr(first, "shard_bytes") else there  # type: ignore[type-var]
        convert(folder / "b", folder / "c", of=back, to=again)
        assert files(folder / "c") == files(folder / "a")
        convert(folder / "c", folder / "end", of=there, to=Ours(template="model.layers.{layer}.mlp"))
        end: Tensors = {}
        for path in (folder / "end").glob("*.safetensors"):
            end |= map_safetensors(path)
        assert end.keys() == tensors.keys()
        for name, tensor in tensors.items():
            zero = name.endswith("price_E") and not tensor.any()  # a price of zero has either sign
            assert zero or as_bytes(end[name]) == as_bytes(tensor), name


def test_every_family_is_under_the_law() -> None:
    same = {"phimoe": "mixtral", "qwen3_moe": "qwen2_moe", "olmoe": "qwen2_moe", "glm4_moe": "deepseek_v3"}
    assert {same.get(family, family) for family in FAMILIES} == HF.keys()
