"""Files whose tensors are memory of the process: read without being loaded, written without being held.

The kernel brings pages in and takes them out, so a conversion needs memory for the piece in hand and no more, whatever
the size of the model. Both formats say where a tensor's bytes lie: safetensors in its header, torch's zip by mapping.
"""

from __future__ import annotations

import json
import mmap
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moe.conversion.place import Shape

Spec = tuple[Shape, torch.dtype]
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Kept(NamedTuple):
    """A tensor of a file, read when it is wanted."""

    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, not to be written to."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{path}: is not a safetensors file, or a damaged one")
        header = _header(path, file.read(length))
        # A private mapping that may be written to: torch has no tensors that may not.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, about in header.items():
        start, end = about["data_offsets"]
        if about["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {about['dtype']}; expected one of {', '.join(DTYPES)}")
        if 8 + length + end > size:
            raise ValueError(f"{path}: ends within {name}; it is damaged")
        tensors[name] = _tensor(memory, 8 + length + start, (tuple(about["shape"]), DTYPES[about["dtype"]]))
        if tensors[name].nbytes != end - start:
            raise ValueError(f"{path}: {name} has {end - start} bytes for {about['shape']}; it is damaged")
    return tensors


def create_safetensors(path: Path, specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """A file of zeros for these tensors. What is written to them is written to it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)
    return {
        name: _tensor(memory, 8 + len(text) + header[name]["data_offsets"][0], spec) for name, spec in specs.items()
    }


def map_torch(path: Path, *, trust: bool) -> Any:
    """What torch.save wrote, its tensors not to be written to. trust: run what the pickle asks for."""
    try:
        if trust:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "" if trust else "; if you trust whoever wrote it, say so (--trust), and its pickles are run"
        raise ValueError(f"{path}: torch does not read it: {first}{hint}") from None


def blank(specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Tensors without memory, for create_torch."""
    with FakeTensorMode():
        return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}


def create_torch(path: Path, content: Any) -> Any:
    """The file that torch.save would write, all zeros. -> content, its blank tensors now memory of the file

    The sums in the zip's directory are those of no bytes: torch does not look at them, `unzip -t` does.
    """
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, path)
    before = torch.serialization.get_default_mmap_options() or mmap.MAP_PRIVATE
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    try:
        return torch.load(path, mmap=True, weights_only=True)
    finally:
        torch.serialization.set_default_mmap_options(before)


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        for about in header.values():
            _ = [int(at) for at in about["data_offsets"]], [int(size) for size in about["shape"]], about["dtype"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is not a safetensors file, or a damaged one") from None
    return header


def _tensor(memory: mmap.mmap, start: int, spec: Spec) -> Tensor:
    shape, dtype = spec
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
