"""Contents: what a checkpoint holds, piece by piece, whichever layout it is in."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import torch
from torch import Tensor

from moe.conversion.entries import Entry
from moe.conversion.mapped import Kept
from moe.conversion.place import OF_EXPERTS, Piece, Place, Shape

File = Mapping[str, Kept]
# Of the step, or of the process: no part of a model.
PASSING = re.compile(r"(^|\.)router\.(stat_\w+|local_tokens_per_expert)$|\._extra_state$")


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_order(piece: Piece) -> tuple[object, ...]:
    """By layer, experts first."""
    return natural(piece.layer), piece.expert is None, piece.expert or 0, piece.part


def fingerprint(tensor: Tensor) -> bytes:
    """Of type and numbers, in order; not of the shape."""
    digest = blake2b(str(tensor.dtype).encode(), digest_size=16)
    # A tensor of one number is contiguous whatever its strides; as bytes it is not.
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


@dataclass(frozen=True)
class Held:
    """A piece where it was found."""

    kept: Kept
    place: Place
    shape: Shape

    @property
    def dtype(self) -> torch.dtype:
        return self.kept.dtype

    def read(self) -> Tensor:
        view = self.place.view(self.kept.read())
        return -view if self.place.negated else view


@dataclass(frozen=True, kw_only=True)
class Contents:
    """rest: tensors that are no layer's, by name. replicas: (name, first, other) that should be equal, as each rank has
    one. faults: what is wrong with the checkpoint in itself."""

    pieces: dict[Piece, Held] = field(default_factory=dict)
    rest: dict[str, Kept] = field(default_factory=dict)
    replicas: list[tuple[str, Kept, Kept]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[str]:
        return sorted({piece.layer for piece in self.pieces}, key=natural)

    @classmethod
    def of(cls, ranks: Sequence[File], entries: Sequence[Entry]) -> Contents:
        """ranks: the tensors of each expert-parallel rank, whose experts are numbered from 0 in each."""
        found = cls()
        names = [_Recognised.of(file, entries, len(ranks)) for file in ranks]
        for rank, (file, known) in enumerate(zip(ranks, names, strict=True)):
            found._take(rank, file, known)
        found._check()
        ordered = {piece: found.pieces[piece] for piece in sorted(found.pieces, key=in_order)}
        return replace(found, pieces=ordered)

    def _take(self, rank: int, file: File, known: _Recognised) -> None:
        for key, (layer, number, entry) in known.at.items():
            experts = known.experts[layer]
            gated = known.gated[layer, "shared_" if entry.parts[0].startswith("shared_") else ""]
            numbers = range(experts) if entry.stacked else [number]
            for local in numbers:
                expert = rank * experts + local if entry.of_experts and local is not None else None
                for part in entry.parts if gated or len(entry.parts) == 1 else entry.parts[1:]:
                    self._add(Piece(layer, expert, part), file[key], entry.place(layer, part, gated, local, experts))
        for key in file.keys() - known.at.keys():
            if PASSING.search(key):
                continue
            if key in self.rest:
                self.replicas.append((key, self.rest[key], file[key]))
            else:
                self.rest[key] = file[key]

    def _add(self, piece: Piece, kept: Kept, place: Place) -> None:
        try:
            shape = tuple(place.view(torch.empty(kept.shape, dtype=kept.dtype, device="meta")).shape)
        except (RuntimeError, IndexError):
            self.faults.append(f"{piece}: {place.key} has shape {list(kept.shape)}, in which it cannot lie")
            return
        if piece not in self.pieces:
            self.pieces[piece] = Held(kept, place, shape)
        elif piece.expert is None:
            self.replicas.append((str(piece), self.pieces[piece].kept, kept))
        else:
            self.faults.append(f"{piece} is doubled: {self.pieces[piece].place.key} and {place.key}")

    def _check(self) -> None:
        """Are all experts there, each with what the others have, in the shape that the others have?"""
        of: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        shapes: dict[tuple[str, str], Counter[Shape]] = defaultdict(Counter)
        for piece, held in self.pieces.items():
            if piece.expert is not None:
                of[piece.layer][piece.expert].add(piece.part)
                shapes[piece.layer, piece.part][held.shape] += 1
        inside = tuple(f"{layer}.{part}experts." for layer in of for part in ("", "deepspeed_moe."))
        self.faults.extend(
            f"{key} is of an expert, and not known: is it quantized, or of another layout?"
            for key in self.rest
            if key.startswith(inside)
        )
        for layer, experts in of.items():
            router = self.pieces.get(Piece(layer, None, "router"))
            count = max(*experts, 0 if router is None else router.shape[0] - 1) + 1
            self.faults.extend(f"{layer}: expert {n} is lost" for n in range(count) if n not in experts)
            parts = set().union(*experts.values())
            self.faults.extend(
                f"{Piece(layer, n, part)} is lost"
                for n, own in sorted(experts.items())
                for part in OF_EXPERTS
                if part in parts - own
            )
            self._check_shapes(layer, shapes, None if router is None else router.shape[1])
        for piece, held in self.pieces.items():
            if piece.expert is not None:
                usual = shapes[piece.layer, piece.part].most_common(1)[0][0]
                if held.shape != usual:
                    why = "is transposed: it" if held.shape == usual[::-1] else "does not fit: it"
                    self.faults.append(f"{piece} {why} has shape {list(held.shape)}, the others have {list(usual)}")

    def _check_shapes(self, layer: str, shapes: Mapping[tuple[str, str], Counter[Shape]], dim: int | None) -> None:
        usual = {part: shapes[layer, part].most_common(1)[0][0] for part in OF_EXPERTS if shapes[layer, part]}
        if missing := {"up", "down"} - usual.keys():
            self.faults.append(f"{layer}: no expert has {' or '.join(sorted(missing))}")
            return
        up, down = usual["up"], usual["down"]
        if up != down[::-1] or usual.get("gate", up) != up or (dim is not None and up[1] != dim):
            wide = "" if dim is None else f", the router [experts, {dim}]"
            self.faults.append(
                f"{layer}: up is {list(up)} and down {list(down)}{wide}; expected [F, D] and [D, F]: another layout"
            )


@dataclass(frozen=True)
class _Recognised:
    """Of one rank's tensors: the layer, the number in the name, and the entry of each. experts: how many the rank has.
    gated: whether there is a gate, by layer and by what it is of, "" for experts and "shared_"."""

    at: dict[str, tuple[str, int | None, Entry]]
    experts: dict[str, int]
    gated: dict[tuple[str, str], bool]

    @classmethod
    def of(cls, file: File, entries: Sequence[Entry], ranks: int) -> _Recognised:
        at: dict[str, tuple[str, int | None, Entry]] = {}
        for key in file:
            for entry in entries:
                if entry.of_experts and (hit := entry.match(key)) is not None:
                    at[key] = (*hit, entry)
                    break
        for layer in {layer for layer, _, _ in at.values()}:
            for entry in entries:
                key = f"{layer}.{entry.name}" if layer else entry.name
                if not entry.of_experts and key in file:
                    at[key] = layer, None, entry
        experts: Counter[str] = Counter()
        for key, (layer, number, entry) in at.items():
            shape = file[key].shape
            if entry.parts == ("router",):
                experts[layer] = max(experts[layer], shape[0] // ranks)
            elif entry.of_experts and (number is not None or (entry.stacked and not entry.flat)):
                experts[layer] = max(experts[layer], shape[0] if number is None else number + 1)
        widths: dict[tuple[str, str], int] = {}
        for key, (layer, _, entry) in at.items():
            for end, axis in (("up", 0), ("down", 1)):
                if entry.parts[-1].removeprefix("shared_") == end:
                    shape = entry.matrix(file[key].shape, experts[layer])
                    widths[layer, entry.parts[-1]] = shape[axis] if len(shape) == 2 else 0
        gated = {
            (layer, kind): widths.get((layer, f"{kind}up"), 0) == 2 * widths.get((layer, f"{kind}down"), 0)
            for layer in experts
            for kind in ("", "shared_")
        }
        return cls(at, dict(experts), gated)
