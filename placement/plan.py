"""Placement: where one layer's experts live. Plan: a placement per layer, with where it came from and what it proves.

A file holds one Plan as JSON: {"schema", "fingerprint", "provenance", "layers": [{"expert_RS", "certificate"}]}. The
fingerprint covers the placements alone: two plans that put every expert in the same place have the same one, whoever
made them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
SCHEMA = "evenmoe.plan/1"
EMPTY = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Where one layer's experts live. Every expert has a slot, and no rank holds an expert twice.

    expert_RS: the expert in each slot of each rank, -1 for an empty slot. Ranks with fewer slots are padded with -1.
    The first copy of an expert, in rank order, is its home.
    """

    expert_RS: IntArray

    def __post_init__(self) -> None:
        try:
            expert_RS = np.array(self.expert_RS)
        except ValueError:
            raise ValueError("expert_RS must be a table [ranks, slots]; pad ranks with fewer slots with -1") from None
        if expert_RS.ndim != 2 or expert_RS.shape[0] == 0 or (expert_RS.size and expert_RS.dtype.kind not in "iu"):
            raise ValueError(
                f"expert_RS must be a table [ranks, slots] of whole numbers; got shape {expert_RS.shape}, "
                f"type {expert_RS.dtype}"
            )
        expert_RS = expert_RS.astype(np.int64)
        expert_RS.setflags(write=False)
        object.__setattr__(self, "expert_RS", expert_RS)
        if expert_RS.size and expert_RS.min() < EMPTY:
            raise ValueError(
                f"expert_RS holds {int(expert_RS.min())}; use an expert's id >= 0, or -1 for an empty slot"
            )
        num_experts = int(expert_RS.max(initial=EMPTY)) + 1
        count_RE = np.zeros((len(expert_RS), num_experts), dtype=np.int64)
        rank_N, slot_N = np.nonzero(expert_RS != EMPTY)
        np.add.at(count_RE, (rank_N, expert_RS[rank_N, slot_N]), 1)
        if (homeless := np.flatnonzero(count_RE.sum(axis=0) == 0)).size:
            raise ValueError(
                f"expert {int(homeless[0])} has no slot, though expert {num_experts - 1} has one; give every expert "
                f"from 0 on at least one slot"
            )
        if (twice := np.argwhere(count_RE > 1)).size:
            rank, expert = twice[0].tolist()
            raise ValueError(f"rank {rank} holds expert {expert} twice; a second copy helps only on another rank")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and np.array_equal(self.expert_RS, other.expert_RS)

    def __hash__(self) -> int:
        return hash((self.expert_RS.shape, self.expert_RS.tobytes()))

    @property
    def ranks(self) -> int:
        return len(self.expert_RS)

    @cached_property
    def num_experts(self) -> int:
        return int(self.expert_RS.max(initial=EMPTY)) + 1

    @cached_property
    def held_RE(self) -> NDArray[np.bool_]:
        """Which rank holds which expert."""
        held_RE = np.zeros((self.ranks, self.num_experts), dtype=np.bool_)
        rank_N, slot_N = np.nonzero(self.expert_RS != EMPTY)
        held_RE[rank_N, self.expert_RS[rank_N, slot_N]] = True
        held_RE.setflags(write=False)
        return held_RE

    @cached_property
    def home_E(self) -> IntArray:
        """The rank of each expert's first copy."""
        home_E: IntArray = self.held_RE.argmax(axis=0)
        return home_E

    @cached_property
    def homed_R(self) -> tuple[tuple[int, ...], ...]:
        """The experts at home on each rank, ascending."""
        return tuple(tuple(np.flatnonzero(self.home_E == rank).tolist()) for rank in range(self.ranks))

    @cached_property
    def copies_E(self) -> IntArray:
        copies_E: IntArray = self.held_RE.sum(axis=0)
        return copies_E

    @cached_property
    def slots(self) -> int:
        """Slots that hold an expert."""
        return int((self.expert_RS != EMPTY).sum())

    def experts_of(self, rank: int) -> IntArray:
        """The experts that a rank holds, in the order of its slots."""
        slots = self.expert_RS[rank]
        experts: IntArray = slots[slots != EMPTY]
        return experts


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """No placement of this layer can have a peak/mean below bound; this one has (1 + gap) * bound."""

    bound: float
    gap: float
    method: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A Placement for each layer, its provenance and, where the planner proved them, a certificate for each layer."""

    placement_L: tuple[Placement, ...]
    certificate_L: tuple[Certificate, ...] = ()
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "placement_L", tuple(self.placement_L))
        object.__setattr__(self, "certificate_L", tuple(self.certificate_L))
        if not self.placement_L:
            raise ValueError("a Plan needs at least one layer")
        if self.certificate_L and len(self.certificate_L) != len(self.placement_L):
            raise ValueError(
                f"{len(self.certificate_L)} certificates for {len(self.placement_L)} layers; give one each, or none"
            )
        ranks = {placement.ranks for placement in self.placement_L}
        if len(ranks) > 1:
            raise ValueError(f"the layers of a Plan must share their ranks; got placements on {sorted(ranks)} ranks")

    @property
    def ranks(self) -> int:
        return self.placement_L[0].ranks

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the placements, in hexadecimal."""
        tables = [placement.expert_RS.tolist() for placement in self.placement_L]
        return hashlib.sha256(json.dumps(tables, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """Deterministic to the byte."""
        layers: list[dict[str, Any]] = [{"expert_RS": p.expert_RS.tolist()} for p in self.placement_L]
        for layer, certificate in zip(layers, self.certificate_L, strict=False):
            layer["certificate"] = vars(certificate)
        document = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "provenance": dict(sorted(self.provenance.items())),
            "layers": layers,
        }
        return json.dumps(document, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "<text>") -> Self:
        """source names the file in every error."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not a plan: line {error.lineno}: {error.msg}") from None
        if not isinstance(document, dict) or "schema" not in document:
            raise ValueError(f"{source}: not a plan: field 'schema' is missing; expected {SCHEMA!r}")
        if document["schema"] != SCHEMA:
            raise ValueError(f"{source}: field 'schema' is {document['schema']!r}; this version reads {SCHEMA!r}")
        layers = _field(document, "layers", list, source)
        placements = tuple(_placement(layer, f"layers[{index}]", source) for index, layer in enumerate(layers))
        certificates = tuple(
            _certificate(layer["certificate"], f"layers[{index}].certificate", source)
            for index, layer in enumerate(layers)
            if "certificate" in layer
        )
        provenance = _field(document, "provenance", dict, source)
        try:
            plan = cls(placement_L=placements, certificate_L=certificates, provenance=provenance)
        except ValueError as error:
            raise ValueError(f"{source}: field 'layers': {error}") from None
        written = _field(document, "fingerprint", str, source)
        if written != plan.fingerprint:
            raise ValueError(
                f"{source}: field 'fingerprint' is {written[:12]}..., but the placements give "
                f"{plan.fingerprint[:12]}...; the file was changed after it was written: make the plan again"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Atomic: the file is whole or not there."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{os.fspath(path)}: not a plan: the file is not text") from None
        return cls.from_json(text, source=os.fspath(path))


def _field(document: Mapping[str, Any], name: str, kind: type, source: str) -> Any:
    if name not in document:
        raise ValueError(f"{source}: field '{name}' is missing")
    if not isinstance(document[name], kind):
        raise ValueError(f"{source}: field '{name}' must be a {kind.__name__}; got {type(document[name]).__name__}")
    return document[name]


def _placement(layer: object, where: str, source: str) -> Placement:
    if not isinstance(layer, dict) or "expert_RS" not in layer:
        raise ValueError(f"{source}: field '{where}.expert_RS' is missing")
    rows: ArrayLike = layer["expert_RS"]
    if not isinstance(rows, Sequence) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{source}: field '{where}.expert_RS' must be a table [ranks, slots]")
    try:
        return Placement(expert_RS=rows)  # type: ignore[arg-type]  # the constructor makes the array
    except ValueError as error:
        raise ValueError(f"{source}: field '{where}.expert_RS': {error}") from None


def _certificate(fields: object, where: str, source: str) -> Certificate:
    try:
        bound, gap, method = (fields[name] for name in ("bound", "gap", "method"))  # type: ignore[index]
        return Certificate(bound=float(bound), gap=float(gap), method=str(method))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: field '{where}' is damaged: {error}") from None
