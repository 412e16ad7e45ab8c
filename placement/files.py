"""Reading arrays without trusting the file, and writing a file whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    write_all({Path(path): content})


def write_all(content: Mapping[Path, bytes]) -> None:
    """Several files, all of them or none: everything is on the disk beside its place before anything takes its place.

    Errors name the file asked for, not the one beside it.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in content}
    try:
        for path, data in content.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            with _about(path):
                temporary[path].write_bytes(data)
        for path in content:
            with _about(path):
                temporary[path].replace(path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
