"""Opening a recording: the plain values in a file, whatever wrote them, with nothing in it executed."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.arrays import FloatArray, IntArray
from placement.files import read_npz
from placement.trace import MOST_LOAD

# The -1 that engines pad tables with.
PADDING = -1
# A step or a pass counts up for as long as an engine runs; beyond this the field held something else.
MOST = 2**53
# No model has so many experts or layers, no machine so many slots: what says so is damaged.
MOST_EXPERTS = 2**16


def open_values(path: Path) -> Any:
    """An array, or a mapping of names to arrays and plain values: .npy, .npz, .json, .pt."""
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: the file is empty")
    if path.suffix == ".npz":
        return read_npz(content, str(path))
    if path.suffix == ".npy":
        try:
            return np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: not an .npy file, or a damaged one: {error}") from None
    if path.suffix in {".pt", ".pth"}:
        return _torch_values(content, path)
    try:
        return json_values(content, str(path))
    except ValueError as error:
        if path.suffix == ".json":
            raise
        raise ValueError(f"{error}; a file that is no .npz, .npy, .csv, .jsonl or .pt is read as JSON") from None


def json_values(content: str | bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{where}: not JSON: brackets nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _torch_values(content: bytes, path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path}: reading a .pt file needs torch; save it as .npz instead") from None
    try:
        with warnings.catch_warnings():
            # torch warns of a pickle it does not know before it raises the error that is reported here.
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a torch file of tensors, or a damaged one: {line}") from None
    return _plain(loaded)


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):
        tensor = value.detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def field(values: Any, name: str, path: Path) -> Any:
    if not isinstance(values, dict) or name not in values:
        raise ValueError(f"{path}: field '{name}' is missing")
    return values[name]


def integer(value: Any, name: str, path: Path, most: int = MOST) -> int:
    """One whole number from 0 to most."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        raise ValueError(f"{path}: field '{name}' must be a whole number; got {str(value)[:40]!r}")
    if not 0 <= value <= most:
        raise ValueError(f"{path}: field '{name}' is {str(value)[:40]}; expected 0 to {most}")
    return int(value)


def listed(value: Any, name: str, path: Path) -> list[Any]:
    """A list with something in it."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: field '{name}' must be a list, and not an empty one")
    return value


def numbers(value: Any, name: str, path: Path, ndim: tuple[int, ...]) -> FloatArray:
    """Finite numbers >= 0 in so many dimensions."""
    array = _array(value, name, path, ndim)
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: field '{name}' holds {array[~np.isfinite(array)][0]}; expected finite numbers")
    if array.size and array.min() < 0:
        raise ValueError(f"{path}: field '{name}' holds the negative number {array.min():g}")
    if float(array.max()) > MOST_LOAD:
        raise ValueError(f"{path}: field '{name}' holds {array.max():g}; expected numbers up to {MOST_LOAD:g}")
    return array.astype(np.float64)


def whole(value: Any, name: str, path: Path, ndim: tuple[int, ...], most: int = MOST_EXPERTS) -> IntArray:
    """Whole numbers from -1 up, below most, in so many dimensions."""
    array = _array(value, name, path, ndim)
    if not np.isfinite(array).all() or (array % 1).any():
        raise ValueError(f"{path}: field '{name}' must hold whole numbers")
    if array.size and array.min() < PADDING:
        raise ValueError(f"{path}: field '{name}' holds {array.min():g}; expected an expert, or -1 for none")
    if array.max() >= most:
        raise ValueError(f"{path}: field '{name}' holds {array.max():g}; expected numbers below {most}")
    return array.astype(np.int64)


def _array(value: Any, name: str, path: Path, ndim: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = np.array(value)
    except ValueError:
        raise ValueError(f"{path}: field '{name}' is ragged; expected rows of one length") from None
    if array.dtype.kind == "b":
        raise ValueError(f"{path}: field '{name}' holds true and false; expected numbers")
    if array.dtype.kind not in "iuf" or array.ndim not in ndim:
        dimensions = " or ".join(str(n) for n in ndim)
        raise ValueError(
            f"{path}: field '{name}' must be a table of numbers in {dimensions} dimensions; got shape {array.shape}, "
            f"type {array.dtype}"
        )
    if not array.size:
        raise ValueError(f"{path}: field '{name}' is empty")
    return array


def to_logical(count_WLP: FloatArray, expert_LP: IntArray, path: Path) -> FloatArray:
    """Counts of slots as counts of the experts in them."""
    if expert_LP.shape != count_WLP.shape[1:]:
        raise ValueError(f"{path}: counts of {count_WLP.shape[1:]} slots, but a map of {expert_LP.shape}")
    load_WLE = np.zeros((*count_WLP.shape[:2], int(expert_LP.max()) + 1))
    for layer, expert_P in enumerate(expert_LP):
        in_slot_PE = expert_P[:, None] == np.arange(load_WLE.shape[2])
        load_WLE[:, layer] = count_WLP[:, layer] @ in_slot_PE
    return load_WLE


def busy(load_WLE: FloatArray, name: str, path: Path) -> FloatArray:
    """The same, refused where a layer saw no load."""
    if (idle := np.flatnonzero(load_WLE.sum(axis=(0, 2)) == 0)).size:
        raise ValueError(
            f"{path}: field '{name}' is zero for every expert of layer {int(idle[0])}; leave out layers without load"
        )
    return load_WLE


def without_dense(load_WLE: FloatArray, name: str, path: Path) -> tuple[FloatArray, tuple[int, ...]]:
    """The layers and windows that saw any load, and the layers' numbers: rows of dense layers are all zero."""
    busy_L = np.flatnonzero(load_WLE.sum(axis=(0, 2)))
    if not busy_L.size:
        raise ValueError(f"{path}: field '{name}' is zero everywhere; nothing was recorded")
    kept = load_WLE[:, busy_L]
    return kept[kept.sum(axis=(1, 2)) > 0], tuple(busy_L.tolist())
