"""detect: which of the layouts a checkpoint is in, of one host's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.conversion import deepspeed, huggingface, megatron
from moe.conversion.contents import Contents
from moe.conversion.convert import template_of
from moe.conversion.layouts import ALWAYS, Layout, Ours

HOSTS = ("evenmoe", "hf", "megatron", "deepspeed")


def detect(folder: Path, host: str, *, family: str = "", style: str = "", trust: bool = False) -> Layout:
    """The layout under whose names most is recognised, filled in so that writing in it would give the same files.

    family, style: what it must be; "" to find out.
    """
    if not folder.exists():
        raise ValueError(f"{folder}: is not there")
    candidates = _candidates(folder, host, family, style, trust)
    ranks, _ = candidates[0].load(folder)
    found = [Contents.of(ranks, candidate.entries) for candidate in candidates]
    score = [len(contents.pieces) - len(contents.faults) for contents in found]
    best = [number for number, each in enumerate(score) if each == max(score) and found[number].pieces]
    if not best:
        keys = [key for key in ranks[0] if "expert" in key][:3]
        seen = f"it has {', '.join(keys)}" if keys else "no name in it has 'expert'"
        names = ", ".join(candidate.name for candidate in candidates)
        raise ValueError(f"{folder}: no expert is recognised; {seen}; expected {names}")
    places = [{piece: held.place for piece, held in found[number].pieces.items()} for number in best]
    if any(other != places[0] for other in places[1:]):
        names = ", ".join(candidates[number].name for number in best)
        raise ValueError(f"{folder}: could be {names}; say which family")
    contents, layout = found[best[0]], candidates[best[0]]
    priced = any(piece.part == "price" for piece in contents.pieces)
    known: dict[str, Any] = {"template": template_of(contents.layers), "ranks": len(ranks)}
    return replace(layout, **known, **({"prices": ALWAYS} if priced else {}))  # type: ignore[type-var]


def _candidates(folder: Path, host: str, family: str, style: str, trust: bool) -> Sequence[Layout]:
    if host == "evenmoe":
        return [Ours()]
    if host == "hf":
        said = family or huggingface.family_of(folder)
        return [huggingface.HuggingFace(family=name) for name in ([said] if said else huggingface.FAMILIES)]
    if host == "megatron":
        return [megatron.Megatron(style=name, trust=trust) for name in ([style] if style else megatron.STYLES)]
    if host == "deepspeed":
        return [deepspeed.DeepSpeed(style=name, trust=trust) for name in ([style] if style else deepspeed.STYLES)]
    raise ValueError(f"host {host!r} is not one of {', '.join(HOSTS)}")
