"""Placement: where one layer's experts live. Plan: a placement per layer, with where it came from and what it proves.

A file holds one Plan as JSON: {"schema", "fingerprint", "provenance", "topology", "layer_L", "layers": [{"expert_RS",
"certificate"}]}; topology and certificates where they are known. The fingerprint covers the placements alone: two plans
that put every expert in the same place have the same one, whoever made them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from placement.arrays import IntArray
from placement.bounds import Certificate
from placement.files import write_whole
from placement.topology import Topology

SCHEMA = "evenmoe.plan/1"
EMPTY = -1
Provenance = Mapping[str, str | int | float]


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
        present = np.unique(expert_RS[expert_RS != EMPTY])
        if len(present) < num_experts:
            homeless = int(np.flatnonzero(present != np.arange(len(present)))[0])
            raise ValueError(
                f"expert {homeless} has no slot, though expert {num_experts - 1} has one; "
                f"give every expert from 0 on at least one slot"
            )
        count_RE = np.zeros((len(expert_RS), num_experts), dtype=np.int64)
        rank_N, slot_N = np.nonzero(expert_RS != EMPTY)
        np.add.at(count_RE, (rank_N, expert_RS[rank_N, slot_N]), 1)
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
class Plan:
    """A Placement for each layer, its provenance and, from a planner, a certificate for each layer and the topology.

    layer_L: the model's own number of each layer, where a dense layer takes a number; 0, 1, ... where not given.
    """

    placement_L: tuple[Placement, ...]
    certificate_L: tuple[Certificate, ...] = ()
    provenance: Provenance = field(default_factory=dict)
    topology: Topology | None = None
    layer_L: tuple[int, ...] = ()

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
        layer_L = tuple(int(layer) for layer in self.layer_L) or tuple(range(len(self.placement_L)))
        object.__setattr__(self, "layer_L", layer_L)
        if len(layer_L) != len(self.placement_L) or layer_L[0] < 0 or any(a >= b for a, b in pairwise(layer_L)):
            raise ValueError(
                f"layer_L needs {len(self.placement_L)} ascending numbers >= 0, one a layer; got {layer_L}"
            )
        if self.topology is not None:
            self._check_topology(self.topology)

    def _check_topology(self, topology: Topology) -> None:
        if topology.ranks != self.ranks:
            raise ValueError(f"the topology has {topology.ranks} ranks, the placements have {self.ranks}")
        for layer, placement in enumerate(self.placement_L):
            held_R = (placement.expert_RS != EMPTY).sum(axis=1)
            if (over := np.flatnonzero(held_R > np.array(topology.slots_R))).size:
                rank = int(over[0])
                held = f", as its memory holds {topology.held_R[rank]}" if topology.memory_R else ""
                raise ValueError(
                    f"layer {layer} puts {held_R[rank]} experts on rank {rank} of {topology.slots_R[rank]} slots{held}"
                )

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
            layer["certificate"] = certificate.fields()
        document = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "provenance": dict(sorted(self.provenance.items())),
            "layer_L": list(self.layer_L),
            "layers": layers,
        }
        if self.topology is not None:
            document["topology"] = self.topology.fields()
        return json.dumps(document, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "<text>") -> Self:
        """source names the file in every error."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not a plan: line {error.lineno}: {error.msg}") from None
        except RecursionError:
            raise ValueError(f"{source}: not a plan: brackets nested too deep") from None
        except ValueError as error:
            raise ValueError(f"{source}: not a plan: {error}") from None
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
        topology = _topology(document["topology"], source) if "topology" in document else None
        layer_L = _field(document, "layer_L", list, source) if "layer_L" in document else ()
        try:
            plan = cls(
                placement_L=placements,
                certificate_L=certificates,
                provenance=provenance,
                topology=topology,
                layer_L=tuple(layer_L),
            )
        except (TypeError, ValueError) as error:
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
        write_whole(path, self.to_json().encode())

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


def _certificate(fields: Any, where: str, source: str) -> Certificate:
    try:
        return Certificate.read(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: field '{where}' is damaged: {error}") from None


def _topology(fields: Any, source: str) -> Topology:
    try:
        return Topology.read(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: field 'topology' is damaged: {error}") from None
