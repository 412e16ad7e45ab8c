"""LoadTrace: what the experts of a model were asked to do, window by window."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from placement.arrays import FloatArray, frozen
from placement.counts import follow, loads, together
from placement.files import read_npz, write_whole

SCHEMA = "evenmoe.trace/1"
NOBODY = -1
# Larger loads overflow once squared or added up.
MOST_LOAD = 1e100


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadTrace:
    """Observed load and, where known, which tokens made it.

    load_WLE: rows sent to each expert of each layer in each window. A window is what a plan must balance at once: a
    batch, a minute, a task.
    expert_TLK: the experts that each token chose in each layer, -1 for a choice not made; None where unknown.
    window_T: the window of each token.
    pair_LEE: mass that went from expert e of a layer to expert f of the next, one entry less than layers; made from
    expert_TLK (a token weighs 1 per pair of layers) where only that is given.
    name_W: what each window is called; windows of one name belong to one scenario. Empty: a window has no name.
    layer_L: the model's own number of each layer, ascending; layers_in_model counts the dense ones as well.
    """

    load_WLE: FloatArray
    expert_TLK: NDArray[np.int32] | None = None
    window_T: NDArray[np.int64] | None = None
    pair_LEE: FloatArray | None = None
    name_W: tuple[str, ...] = ()
    layer_L: tuple[int, ...] = ()
    layers_in_model: int = 0

    def __post_init__(self) -> None:
        load_WLE = frozen(self.load_WLE, np.float64, "load_WLE")
        object.__setattr__(self, "load_WLE", load_WLE)
        if load_WLE.ndim != 3 or 0 in load_WLE.shape:
            raise ValueError(f"load_WLE must be a table [windows, layers, experts]; got shape {load_WLE.shape}")
        if not np.isfinite(load_WLE).all():
            window, layer, expert = np.argwhere(~np.isfinite(load_WLE))[0].tolist()
            raise ValueError(f"load_WLE[{window}, {layer}, {expert}] is {load_WLE[window, layer, expert]}; use numbers")
        if load_WLE.max() > MOST_LOAD:
            raise ValueError(f"load_WLE holds {load_WLE.max():g}; use numbers up to {MOST_LOAD:g}")
        if load_WLE.min() < 0:
            window, layer, expert = np.argwhere(load_WLE < 0)[0].tolist()
            raise ValueError(f"load_WLE[{window}, {layer}, {expert}] is negative: {load_WLE[window, layer, expert]}")
        if (idle := np.flatnonzero(load_WLE.sum(axis=(0, 2)) == 0)).size:
            raise ValueError(
                f"load_WLE is zero for every expert of layer {int(idle[0])}; leave out layers without load"
            )
        self._check_layers()
        self._check_tokens()
        self._check_pairs()

    def _check_layers(self) -> None:
        layer_L = tuple(int(layer) for layer in self.layer_L) or tuple(range(self.layers))
        object.__setattr__(self, "layer_L", layer_L)
        if len(layer_L) != self.layers or layer_L[0] < 0 or any(a >= b for a, b in pairwise(layer_L)):
            raise ValueError(f"layer_L needs {self.layers} ascending numbers >= 0, one a layer; got {layer_L}")
        object.__setattr__(self, "layers_in_model", self.layers_in_model or layer_L[-1] + 1)
        if self.layers_in_model <= layer_L[-1]:
            raise ValueError(f"layers_in_model is {self.layers_in_model}, but there is a layer {layer_L[-1]}")
        object.__setattr__(self, "name_W", tuple(self.name_W))
        if self.name_W and len(self.name_W) != self.windows:
            raise ValueError(f"name_W has {len(self.name_W)} names for {self.windows} windows; give one each, or none")

    def _check_tokens(self) -> None:
        if self.expert_TLK is None:
            if self.window_T is not None:
                raise ValueError("window_T says the window of each token, but expert_TLK is not given")
            return
        expert_TLK = frozen(self.expert_TLK, np.int32, "expert_TLK")
        window_T = np.zeros(len(expert_TLK), dtype=np.int64) if self.window_T is None else self.window_T
        window_T = frozen(window_T, np.int64, "window_T")
        object.__setattr__(self, "expert_TLK", expert_TLK)
        object.__setattr__(self, "window_T", window_T)
        if expert_TLK.ndim != 3 or expert_TLK.shape[1] != self.layers:
            raise ValueError(f"expert_TLK must be [tokens, {self.layers} layers, choices]; got {expert_TLK.shape}")
        _require_experts(expert_TLK, self.num_experts)
        if window_T.shape != (len(expert_TLK),) or (
            window_T.size and not 0 <= window_T.min() <= window_T.max() < self.windows
        ):
            raise ValueError(f"window_T needs a window below {self.windows} for each of {len(expert_TLK)} tokens")

    def _check_pairs(self) -> None:
        if self.pair_LEE is None:
            return
        pair_LEE = frozen(self.pair_LEE, np.float64, "pair_LEE")
        object.__setattr__(self, "pair_LEE", pair_LEE)
        expected = (self.layers - 1, self.num_experts, self.num_experts)
        if pair_LEE.shape != expected:
            raise ValueError(
                f"pair_LEE must have shape {expected}, a table for each layer but the last; got {pair_LEE.shape}"
            )
        if pair_LEE.size and not (np.isfinite(pair_LEE).all() and pair_LEE.min() >= 0):
            raise ValueError("pair_LEE holds a negative or infinite number; use masses >= 0")

    @classmethod
    def from_choices(
        cls,
        expert_TLK: ArrayLike,
        *,
        num_experts: int,
        window_T: ArrayLike | None = None,
        name_W: Sequence[str] = (),
        layer_L: Sequence[int] = (),
        layers_in_model: int = 0,
    ) -> Self:
        """Count the load of tokens whose choices are known."""
        expert_TLK = frozen(expert_TLK, np.int32, "expert_TLK")
        if expert_TLK.ndim != 3:
            raise ValueError(f"expert_TLK must be [tokens, layers, choices]; got shape {expert_TLK.shape}")
        _require_experts(expert_TLK, num_experts)
        window_T = frozen(np.zeros(len(expert_TLK)) if window_T is None else window_T, np.int64, "window_T")
        if window_T.shape != (len(expert_TLK),) or window_T.min(initial=0) < 0:
            raise ValueError(f"window_T needs a window >= 0 for each of {len(expert_TLK)} tokens; got {window_T.shape}")
        windows = max(int(window_T.max(initial=0)) + 1, len(name_W))
        return cls(
            load_WLE=loads(expert_TLK, window_T, windows, num_experts),
            expert_TLK=expert_TLK,
            window_T=window_T,
            name_W=tuple(name_W),
            layer_L=tuple(layer_L),
            layers_in_model=layers_in_model,
        )

    @property
    def windows(self) -> int:
        return len(self.load_WLE)

    @property
    def layers(self) -> int:
        return int(self.load_WLE.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.load_WLE.shape[2])

    @cached_property
    def load_LE(self) -> FloatArray:
        """All windows together."""
        load_LE: FloatArray = self.load_WLE.sum(axis=0)
        return load_LE

    @cached_property
    def follow_LEE(self) -> FloatArray | None:
        """pair_LEE, made from the tokens' choices where it was not given; None where neither is known."""
        if self.pair_LEE is not None or self.expert_TLK is None or self.layers < 2:
            return self.pair_LEE
        return follow(self.expert_TLK, self.num_experts)

    @cached_property
    def together_LEE(self) -> FloatArray | None:
        """How many tokens chose experts e and f both, e != f; None where the tokens are not known."""
        if self.expert_TLK is None:
            return None
        return together(self.expert_TLK, self.num_experts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the trace, in hexadecimal."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def select(self, window_N: ArrayLike) -> Self:
        """The windows asked for, in that order. Pair masses given without tokens belong to no window: kept."""
        chosen = np.asarray(window_N, dtype=np.int64)
        if chosen.ndim != 1 or chosen.size == 0 or chosen.min() < 0 or chosen.max() >= self.windows:
            raise ValueError(f"choose at least one of {self.windows} windows; got {chosen.tolist()}")
        picked = replace(
            self,
            load_WLE=self.load_WLE[chosen],
            name_W=tuple(self.name_W[window] for window in chosen) if self.name_W else (),
            expert_TLK=None,
            window_T=None,
        )
        if self.expert_TLK is None or self.window_T is None:
            return picked
        place_W = np.full(self.windows, -1)
        place_W[chosen] = np.arange(len(chosen))
        kept = place_W[self.window_T] >= 0
        return replace(picked, expert_TLK=self.expert_TLK[kept], window_T=place_W[self.window_T[kept]])

    def widened(self, num_experts: int) -> Self:
        """The same with experts that nobody chose added after the last one."""
        more = num_experts - self.num_experts
        if more < 0:
            raise ValueError(f"the trace has {self.num_experts} experts already; it cannot have {num_experts}")
        pair_LEE = None if self.pair_LEE is None else np.pad(self.pair_LEE, ((0, 0), (0, more), (0, more)))
        return replace(self, load_WLE=np.pad(self.load_WLE, ((0, 0), (0, 0), (0, more))), pair_LEE=pair_LEE)

    def split(self, every: int = 2) -> tuple[Self, Self]:
        """(fit, held out): every so-manyth window is held out, so both halves see the whole time and every scenario."""
        if self.windows < 2 or every < 2:
            raise ValueError(
                f"cannot hold out every {every}th of {self.windows} windows; use >= 2 of each, or .windowed()"
            )
        held = np.arange(self.windows) % every == every - 1
        if not held.any():
            held[-1] = True
        return self.select(np.flatnonzero(~held)), self.select(np.flatnonzero(held))

    def windowed(self, tokens: int) -> Self:
        """Cut every window into windows of so many tokens; a shorter last piece joins the one before it."""
        if self.expert_TLK is None or self.window_T is None:
            raise ValueError("only a trace that knows its tokens can be cut into windows of tokens")
        if tokens < 1:
            raise ValueError(f"a window needs at least 1 token; got {tokens}")
        window_T = np.zeros(len(self.window_T), dtype=np.int64)
        name_W: list[str] = []
        for window in range(self.windows):
            here = np.flatnonzero(self.window_T == window)
            pieces = max(len(here) // tokens, 1)
            window_T[here] = len(name_W) + np.minimum(np.arange(len(here)) // tokens, pieces - 1)
            name_W += [self.name_W[window] if self.name_W else ""] * pieces
        return type(self).from_choices(
            self.expert_TLK,
            num_experts=self.num_experts,
            window_T=window_T,
            name_W=name_W if self.name_W else (),
            layer_L=self.layer_L,
            layers_in_model=self.layers_in_model,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """An .npz, atomic and deterministic to the byte."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {"schema": np.array(SCHEMA), **self._arrays()}
        np.savez_compressed(stream, **arrays)
        write_whole(path, stream.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What save wrote; placement.formats.read_trace reads other files as well."""
        name = os.fspath(path)
        fields = read_npz(Path(path).read_bytes(), name)
        schema = str(fields.pop("schema", ""))
        if schema != SCHEMA:
            raise ValueError(f"{name}: field 'schema' is {schema!r}; this version reads {SCHEMA!r}")
        if unknown := sorted(fields.keys() - cls.__dataclass_fields__.keys()):
            raise ValueError(f"{name}: field '{unknown[0]}' is not one of a trace's")
        if "load_WLE" not in fields:
            raise ValueError(f"{name}: field 'load_WLE' is missing")
        try:
            fields["name_W"] = tuple(str(value) for value in fields.get("name_W", ()))
            fields["layer_L"] = tuple(int(value) for value in fields.get("layer_L", ()))
            fields["layers_in_model"] = int(fields.get("layers_in_model", 0))
            return cls(**fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from None

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any] | None] = {
            "load_WLE": self.load_WLE,
            "expert_TLK": self.expert_TLK,
            "window_T": self.window_T,
            "pair_LEE": self.pair_LEE,
            "name_W": np.array(self.name_W, dtype=np.str_) if self.name_W else None,
            "layer_L": np.array(self.layer_L),
            "layers_in_model": np.array(self.layers_in_model),
        }
        return {name: array for name, array in arrays.items() if array is not None}


def _require_experts(expert_TLK: NDArray[np.int32], num_experts: int) -> None:
    if expert_TLK.size and not NOBODY <= expert_TLK.min() <= expert_TLK.max() < num_experts:
        raise ValueError(
            f"expert_TLK holds {expert_TLK.min()} to {expert_TLK.max()}; use an expert's number below {num_experts}, "
            f"or -1 for a choice not made"
        )
