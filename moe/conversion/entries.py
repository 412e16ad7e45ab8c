"""What a layout calls its tensors, as data: one table, used to recognise what is read and to name what is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe.conversion.place import OF_EXPERTS, Place, Shape


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One kind of tensor. name: below the layer's, with {expert} where each expert has its own.

    parts: what it holds; two of them where gate and up share it, in which case it holds up alone in experts without a
    gate. Experts' parts without {expert} in the name are a stack of all.
    """

    name: str
    parts: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    flat: str = ""
    negated: bool = False
    row: bool = False

    @property
    def stacked(self) -> bool:
        return self.of_experts and "{expert}" not in self.name

    @property
    def of_experts(self) -> bool:
        return self.parts[0] in OF_EXPERTS

    def match(self, key: str) -> tuple[str, int | None] | None:
        """(layer, number in the name) if the key is one of these. Only experts make a module a layer of ours."""
        pattern = re.escape(self.name).replace(r"\{expert\}", r"(?P<expert>\d+)")
        found = re.fullmatch(rf"(?:(?P<layer>.+)\.)?{pattern}", key)
        if found is None:
            return None
        number = found["expert"] if "{expert}" in self.name else None
        return found["layer"] or "", None if number is None else int(number)

    def matrix(self, shape: Shape, experts: int) -> Shape:
        """The shape of one piece, or of the two that are joined, by that of the tensor in the file."""
        if self.stacked and self.flat and experts:
            shape = (shape[0], shape[1] // experts) if self.flat == "wide" else (shape[0] // experts, shape[1])
        elif self.stacked or self.row:
            shape = shape[1:]
        return shape[::-1] if self.transposed and len(shape) == 2 else shape

    def place(self, layer: str, part: str, gated: bool, expert: int | None, experts: int) -> Place:
        """expert: its number in the file. experts: how many the file has."""
        name = self.name.replace("{expert}", str(expert))
        stacked = self.stacked or self.row
        return Place(
            key=f"{layer}.{name}" if layer else name,
            half=self.parts.index(part) if len(self.parts) == 2 and gated else None,
            interleaved=self.interleaved,
            transposed=self.transposed,
            slot=(0 if self.row else expert) if stacked else None,
            slots=(1 if self.row else experts) if stacked else 0,
            flat=self.flat,
            negated=self.negated,
        )


def single(part: str, name: str, *, negated: bool = False, row: bool = False) -> Entry:
    return Entry(name=name, parts=(part,), negated=negated, row=row)


def apart(prefix: str, gate: str, up: str, down: str, *, shared: bool = False) -> tuple[Entry, ...]:
    """Three matrices, each with its bias if there is one."""
    kind = "shared_" if shared else ""
    return tuple(
        single(f"{kind}{part}{bias}", f"{prefix}.{name}.{'bias' if bias else 'weight'}")
        for part, name in (("gate", gate), ("up", up), ("down", down))
        for bias in ("", "_bias")
    )


def joined(
    prefix: str, up: str, down: str, *, shared: bool = False, weight: str = ".weight", bias: str = ".bias"
) -> tuple[Entry, ...]:
    """gate over up in one matrix, down in the other."""
    kind = "shared_" if shared else ""
    return (
        Entry(name=f"{prefix}.{up}{weight}", parts=(f"{kind}gate", f"{kind}up")),
        single(f"{kind}down", f"{prefix}.{down}{weight}"),
        Entry(name=f"{prefix}.{up}{bias}", parts=(f"{kind}gate_bias", f"{kind}up_bias")),
        single(f"{kind}down_bias", f"{prefix}.{down}{bias}"),
    )
