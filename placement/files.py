"""Reading arrays without trusting the file, and writing a file whole or not at all."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def read_npz(content: bytes, name: str) -> dict[str, Any]:
    """Every array of an .npz; nothing in it is executed. name is the file's, for the error."""
    try:
        # numpy leaves a file that it opened itself open when the archive is torn.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        return {
            member.removesuffix(".npy"): np.load(io.BytesIO(array), allow_pickle=False)
            for member, array in members.items()
        }
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"{name}: not an .npz file, or a damaged one: {error}") from None


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Atomic: readers see the old file or the new one, and a failure leaves nothing behind."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
