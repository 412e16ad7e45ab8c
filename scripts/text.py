"""Text that is on every machine that runs this: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = ("json", "email", "asyncio", "unittest", "encodings", "xml")


def split_by_file() -> tuple[Tensor, Tensor]:
    """Every tenth file is held out, by a checksum of its name. Tests are left out, and so are the packages below.
    -> bytes to learn from, bytes to be judged on"""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", *PACKAGES}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    held_out = {path for path in files if zlib.crc32(path.relative_to(root).as_posix().encode()) % 10 == 0}
    return _joined([path for path in files if path not in held_out]), _joined(sorted(held_out))


def by_package() -> dict[str, Tensor]:
    """Some packages that nothing learns from: text on several subjects, for traces."""
    root = Path(sysconfig.get_path("stdlib"))
    return {name: _joined(sorted((root / name).rglob("*.py"))) for name in PACKAGES}


def batch_of(text: Tensor, sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences from anywhere in the text, and for each of their bytes the next. -> byte_BT, next_BT"""
    start_B = torch.randint(len(text) - length - 1, (sequences, 1), generator=generator)
    byte_BT = text[start_B + torch.arange(length + 1)]
    return byte_BT[:, :-1], byte_BT[:, 1:]


def _joined(paths: Sequence[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()
