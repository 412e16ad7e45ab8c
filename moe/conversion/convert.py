"""convert: a checkpoint in another layout, bit for bit, a piece at a time."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.conversion.contents import Contents, fingerprint, in_order, natural
from moe.conversion.layouts import ALWAYS, Layout
from moe.conversion.mapped import Spec
from moe.conversion.place import Piece, Place

SHOWN = 5
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """left_out: what the new layout has no place for and a model can be run without."""

    layers: int
    experts: int
    tensors: int
    bytes: int
    rest: int
    left_out: tuple[str, ...]


def read(source: Path, of: Layout) -> Contents:
    """What is there; whatever is wrong with it is in its faults."""
    ranks, faults = of.load(source)
    contents = Contents.of(ranks, of.entries)
    contents.faults[:0] = faults
    if not contents.pieces:
        raise ValueError(f"{source}: has no expert under the names of {of.name}")
    return contents


def convert(source: Path, target: Path, *, of: Layout, to: Layout, rest: bool = True) -> Converted:
    """Experts, routers, shared experts and prices change their names and shapes; all other tensors keep both.

    target: a folder that is not there; it is whole or not there afterwards. rest: False leaves the other tensors out.
    """
    contents = read(source, of)
    faults = [*contents.faults, *unequal(contents)]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError(f"{source}: {'; '.join(faults[:SHOWN])}{more}")
    values: dict[Piece, Spec] = {piece: (held.shape, held.dtype) for piece, held in contents.pieces.items()}
    added, left_out = _fit(contents, values, to)
    others = {key: (kept.shape, kept.dtype) for key, kept in contents.rest.items()} if rest else {}
    names = layer_names(contents.layers, to)
    ranks, places = _plan(values, others, names, to)
    with _whole_or_not_there(target) as folder:
        files = to.create(folder, ranks, [names[layer] for layer in contents.layers])
        for piece, spots in places.items():
            value = added[piece] if piece in added else contents.pieces[piece].read()
            for rank, place in spots:
                place.view(files[rank][place.key]).copy_(-value if place.negated else value)
        for key in others:
            for tensors in files:
                tensors[key].copy_(contents.rest[key].read())
        size = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
        del files
    return Converted(
        layers=len(contents.layers),
        experts=len({piece[:2] for piece in values if piece.expert is not None}),
        tensors=sum(map(len, ranks)),
        bytes=size,
        rest=len(others),
        left_out=tuple(left_out),
    )


def unequal(contents: Contents) -> list[str]:
    """What the ranks should have alike, and have not."""
    return [
        f"{name} differs from rank to rank"
        for name, first, other in contents.replicas
        if first.shape != other.shape or fingerprint(first.read()) != fingerprint(other.read())
    ]


def template_of(layers: Sequence[str]) -> str:
    """The name that the layers share but for their number, "" if they do not."""
    templates = {_split(layer)[0] for layer in layers}
    return templates.pop() if len(templates) == 1 and all(_split(layer)[1] is not None for layer in layers) else ""


def layer_names(layers: Sequence[str], to: Layout) -> dict[str, str]:
    """What each layer is called in the new layout."""
    if not to.template:
        return {layer: layer for layer in layers}
    numbers = [_split(layer)[1] for layer in layers]
    if "{layer}" not in to.template and len(layers) == 1:
        return {layers[0]: to.template}
    if None in numbers or len(set(numbers)) < len(numbers) or "{layer}" not in to.template:
        raise ValueError(
            f"the layers {', '.join(map(repr, layers[:SHOWN]))} cannot be named {to.template!r}: expected {{layer}} in "
            f"it and a number of its own in each name; give another name, such as 'layers.{{layer}}.moe'"
        )
    return {layer: to.template.replace("{layer}", str(number)) for layer, number in zip(layers, numbers, strict=True)}


def number_of(layer: str) -> int | None:
    return _split(layer)[1]


def _split(layer: str) -> tuple[str, int | None]:
    """model.layers.3.mlp -> model.layers.{layer}.mlp, 3"""
    found = [*NUMBER.finditer(layer)]
    if not found:
        return layer, None
    last = found[-1]
    return f"{layer[: last.start()]}{{layer}}{layer[last.end() :]}", int(last[0])


def _fit(contents: Contents, values: dict[Piece, Spec], to: Layout) -> tuple[dict[Piece, Tensor], list[str]]:
    """Takes out of values what the layout has no place for, and puts in what it must have. -> (that, what is left out)

    A price of zeros is no price: a layout without prices says the same. Any other is not left out in silence.
    """
    known = {part for entry in to.entries for part in entry.parts}
    added: dict[Piece, Tensor] = {}
    left_out: list[str] = []
    homeless: list[str] = []
    for piece in list(values):
        zero = piece.part in {"price", "settled"} and not contents.pieces[piece].read().any()
        if zero and (piece.part not in known or (piece.part == "price" and to.prices != ALWAYS)):
            del values[piece]
        elif piece.part == "settled" and piece.part not in known:
            del values[piece]
            left_out.append(str(piece))
        elif piece.part not in known:
            homeless.append(str(piece))
    if homeless:
        raise ValueError(f"{to.name} has no place for {'; '.join(homeless[:SHOWN])}, {len(homeless)} in all")
    for layer in contents.layers:
        router = contents.pieces.get(Piece(layer, None, "router"))
        experts = 0 if router is None else router.shape[0]
        missing = {"price": torch.zeros(experts), "settled": torch.zeros((), dtype=torch.int64)}
        for part, zeros in missing.items():
            if part in known and Piece(layer, None, part) not in values and (part == "settled" or to.prices == ALWAYS):
                added[Piece(layer, None, part)] = zeros
                values[Piece(layer, None, part)] = tuple(zeros.shape), zeros.dtype
    return added, left_out


def _plan(
    values: Mapping[Piece, Spec], others: Mapping[str, Spec], names: Mapping[str, str], to: Layout
) -> tuple[list[dict[str, Spec]], dict[Piece, list[tuple[int, Place]]]]:
    """-> (the tensors of each rank, the rank and place of each piece)"""
    entries = {part: entry for entry in reversed(to.entries) for part in entry.parts}
    experts: dict[str, int] = defaultdict(int)
    for piece in values:
        experts[piece.layer] = max(experts[piece.layer], 1 + (-1 if piece.expert is None else piece.expert))
    for layer, count in experts.items():
        if count % to.ranks:
            raise ValueError(f"{layer} has {count} experts; they cannot be dealt to {to.ranks} ranks alike")
    gated = {(piece.layer, piece.part.removesuffix("gate")) for piece in values if piece.part.endswith("gate")}
    # In an order of its own, so that the same tensors make the same files wherever they came from.
    ranks: list[dict[str, Spec]] = [{key: others[key] for key in sorted(others, key=natural)} for _ in range(to.ranks)]
    places: dict[Piece, list[tuple[int, Place]]] = {}
    for piece in sorted(values, key=in_order):
        local = experts[piece.layer] // to.ranks
        entry, kind = entries[piece.part], "shared_" if piece.part.startswith("shared_") else ""
        of = range(to.ranks) if piece.expert is None else [piece.expert // local]
        number = None if piece.expert is None else piece.expert % local
        place = entry.place(names[piece.layer], piece.part, (piece.layer, kind) in gated, number, local)
        shape, dtype = values[piece]
        for rank in of:
            ranks[rank][place.key] = place.whole(shape), dtype
        if clash := others.keys() & {place.key}:
            raise ValueError(f"{clash.pop()} is the name of a tensor that is no layer's; give another template")
        places[piece] = [(rank, place) for rank in of]
    return ranks, places


@contextmanager
def _whole_or_not_there(target: Path) -> Iterator[Path]:
    if target.exists():
        raise ValueError(f"{target}: is there already; give a folder that is not")
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was stopped
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
