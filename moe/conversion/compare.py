"""verify: does one checkpoint hold what another does, every expert in its place? By fingerprints of the numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moe.conversion.contents import Contents, Held, fingerprint
from moe.conversion.convert import number_of, read, unequal
from moe.conversion.layouts import Layout
from moe.conversion.place import OF_EXPERTS, Piece

Print = bytes
TWIN = {
    "gate": "up", "up": "gate", "gate_bias": "up_bias", "up_bias": "gate_bias", "shared_gate": "shared_up",
    "shared_up": "shared_gate",
}  # fmt: skip


def verify(source: Path, target: Path, *, of: Layout, to: Layout, rest: bool = True) -> tuple[str, ...]:
    """What is wrong with the target, if it is to be the source in another layout: () if nothing is.

    Reads both, a piece at a time. Experts go by their ids in the layer; layers by their names, or by their numbers.
    """
    first, second = read(source, of), read(target, to)
    faults = [f"{source}: {fault}" for fault in first.faults]
    faults += [f"{target}: {fault}" for fault in [*second.faults, *unequal(second)]]
    named = _same_layers(first.layers, second.layers)
    faults += [f"{layer} is lost" for layer in first.layers if layer not in named]
    faults += [f"{layer} is not in the source" for layer in second.layers if layer not in named.values()]
    prints = {piece: fingerprint(held.read()) for piece, held in first.pieces.items()}
    meant = {Piece(named[piece.layer], *piece[1:]): piece for piece in first.pieces if piece.layer in named}
    faults += _lost(meant, first, second)
    wrong: dict[Piece, Print] = {}
    for piece, held in second.pieces.items():
        if piece in meant:
            found = fingerprint(held.read())
            if found != prints[meant[piece]] or held.shape != first.pieces[meant[piece]].shape:
                wrong[piece] = found
    faults += _explained(wrong, meant, prints, first, second)
    return tuple(faults + (_rest_faults(first, second) if rest else []))


def _same_layers(first: Sequence[str], second: Sequence[str]) -> dict[str, str]:
    if set(first) == set(second):
        return {layer: layer for layer in first}
    numbers = [[number_of(layer) for layer in layers] for layers in (first, second)]
    if all(None not in each and len(set(each)) == len(each) for each in numbers):
        of = dict(zip(numbers[1], second, strict=True))
        return {layer: of[number] for layer, number in zip(first, numbers[0], strict=True) if number in of}
    if len(first) == len(second) == 1:
        return {first[0]: second[0]}
    return {layer: layer for layer in first if layer in second}


def _lost(meant: Mapping[Piece, Piece], first: Contents, second: Contents) -> list[str]:
    """Pieces and whole experts that one has and the other has not. Prices of zero, and counts, may come and go."""
    optional = {"price", "settled"}
    lost = [piece for piece in meant if piece not in second.pieces]
    more = [piece for piece in second.pieces if piece not in meant and piece.layer in {at.layer for at in meant}]
    lost = [at for at in lost if at.part not in optional or _any(first.pieces[meant[at]], at)]
    more = [at for at in more if at.part not in optional or _any(second.pieces[at], at)]
    faults = []
    for pieces, own, what in ((lost, meant, "is lost"), (more, second.pieces, "is not in the source")):
        of: dict[tuple[str, int | None], list[Piece]] = defaultdict(list)
        for piece in pieces:
            of[piece[:2]].append(piece)
        for (layer, expert), parts in of.items():
            if expert is not None and len(parts) == sum((layer, expert, part) in own for part in OF_EXPERTS):
                faults.append(f"{layer}: expert {expert} {what}")
            else:
                faults += [f"{piece} {what}" for piece in parts]
    return faults


def _any(held: Held, piece: Piece) -> bool:
    return piece.part == "price" and bool(held.read().any())


def _explained(
    wrong: Mapping[Piece, Print], meant: Mapping[Piece, Piece], prints: Mapping[Piece, Print], first: Contents,
    second: Contents,
) -> list[str]:  # fmt: skip
    """What each piece that differs holds instead; one line for an expert all of whose pieces say the same."""
    owners: dict[tuple[str, Print], list[Piece]] = defaultdict(list)
    for piece, known in prints.items():
        owners[piece.part, known].append(piece)
    lines: dict[tuple[str, int | None], dict[str, str]] = defaultdict(dict)
    taken: dict[tuple[str, int | None], set[tuple[str, int | None]]] = defaultdict(set)
    for piece, found in wrong.items():
        origin = meant[piece]
        same = owners.get((piece.part, found), [])
        there = [held for held in same if held.layer == origin.layer] or same
        if there and second.pieces[piece].shape == first.pieces[there[0]].shape:
            lines[piece[:2]][piece.part] = f"holds what {_whose(there[0], origin)} has in the source"
            taken[there[0][:2]].add(piece[:2])
        else:
            lines[piece[:2]][piece.part] = _why(piece, found, origin, prints, first)
    return _summed_up(lines, second) + _twice_or_nowhere(taken, {piece[:2]: meant[piece][:2] for piece in wrong})


def _twice_or_nowhere(
    taken: Mapping[tuple[str, int | None], set[tuple[str, int | None]]],
    displaced: Mapping[tuple[str, int | None], tuple[str, int | None]],
) -> list[str]:
    """taken: an expert of the source -> where else its numbers are. displaced: where they should be -> that expert."""
    if not taken:
        return []
    faults = []
    for (layer, expert), places in taken.items():
        times = len(places) + ((layer, expert) not in displaced.values())
        if times > 1 and expert is not None:
            faults.append(f"{layer}: what expert {expert} has in the source is there {times} times")
    usurped = {displaced[place] for places in taken.values() for place in places}
    nowhere = sorted(of for of in usurped if of not in taken and of[1] is not None)
    return faults + [f"{layer}: what expert {expert} has in the source is nowhere" for layer, expert in nowhere]


def _whose(other: Piece, origin: Piece) -> str:
    expert = "it" if other.expert is None else f"expert {other.expert}"
    return expert if other.layer == origin.layer else f"{other.layer}, {expert},"


def _why(piece: Piece, found: Print, origin: Piece, prints: Mapping[Piece, Print], first: Contents) -> str:
    twin = origin._replace(part=TWIN.get(origin.part, origin.part))
    if twin != origin and prints.get(twin) == found:
        return f"holds {twin.part}: gate and up are swapped"
    numbers = first.pieces[origin].read()
    if numbers.ndim == 2 and fingerprint(numbers.T) == found:
        return "is transposed"
    if twin in first.pieces and first.pieces[twin].shape == numbers.shape:
        gate, up = (numbers, first.pieces[twin].read())[:: 1 if "gate" in origin.part else -1]
        both = torch.stack([gate, up], dim=1).flatten(0, 1)
        if fingerprint(both[: len(gate)] if "gate" in origin.part else both[len(gate) :]) == found:
            return "is gate and up row by row, where one after the other was expected"
    return "does not hold what the source has"


def _summed_up(lines: Mapping[tuple[str, int | None], Mapping[str, str]], second: Contents) -> list[str]:
    faults = []
    for (layer, expert), of in lines.items():
        whole = {part for part in OF_EXPERTS if (layer, expert, part) in second.pieces}
        if expert is not None and whole == of.keys() and len(set(of.values())) == 1:
            faults.append(f"{layer}: expert {expert} {next(iter(of.values()))}")
        else:
            faults += [f"{Piece(layer, expert, part)} {why}" for part, why in of.items()]
    return faults


def _rest_faults(first: Contents, second: Contents) -> list[str]:
    faults = [f"{key} is lost" for key in first.rest if key not in second.rest]
    faults += [f"{key} is not in the source" for key in second.rest if key not in first.rest]
    for key, kept in first.rest.items():
        if key in second.rest and (
            kept.shape != second.rest[key].shape or fingerprint(kept.read()) != fingerprint(second.rest[key].read())
        ):
            faults.append(f"{key} does not hold what the source has")
    return faults
