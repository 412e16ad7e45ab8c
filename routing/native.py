"""The compiled path: C++ beside the Python that it speeds up, used where somebody has built it, never needed.

`python -m moe.build` (or `make native`) compiles it into the user's cache, under a name made of the sources, the flags
and this machine's processor: a binary of other sources, of another torch or for another processor is never found, so
nobody has to know when to build again. Nothing is built or downloaded by importing. Without it, or where it does not
load, the Python path does the same; `in_use` says which it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wextra")
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "d": ctypes.c_double}
_python_only = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Library:
    """C++ files that make one binary. functions: of each, the arguments, a letter each: p for an address, n for a whole
    number, d for a double; each returns a whole number. flags: what they need besides FLAGS; links: what comes after.
    """

    name: str
    sources: tuple[Path, ...]
    functions: Mapping[str, str]
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the binary is, or would be."""
        key = hashlib.sha256(repr((FLAGS, self.flags, self.links, processor())).encode())
        for source in self.sources:
            key.update(source.read_bytes())
        return cache_folder() / f"{self.name}-{key.hexdigest()[:16]}.so"

    def build(self) -> Path:
        """Compiles it unless it is there."""
        path = self.path
        if path.exists():
            return path
        if (compiler := next(filter(None, map(shutil.which, COMPILERS)), None)) is None:
            raise ValueError(
                f"no C++ compiler among {', '.join(COMPILERS)}; install one, or do without: it is optional"
            )
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *FLAGS, *self.flags, *map(str, self.sources), "-o", str(made), *self.links]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise ValueError(f"{compiler} cannot build {self.name}; nothing needs it. It said:\n{ended.stderr}")
            made.chmod(0o755)
            made.replace(path)
        _loaded.cache_clear()
        return path

    def load(self) -> ctypes.CDLL | None:
        """None where it is not built, does not load, or `python_only` is on."""
        return None if _python_only else _loaded(self)[0]

    def in_use(self) -> str:
        """Which path runs, and why."""
        if _python_only:
            return "Python, as python_only() asks"
        library, reason = _loaded(self)
        return f"Python: {reason}" if library is None else f"compiled: {reason}"


@contextmanager
def python_only() -> Iterator[None]:
    """The Python path in this process, for tests and benchmarks of both: neither C++ nor the router's Triton kernel."""
    global _python_only
    before, _python_only = _python_only, True
    try:
        yield
    finally:
        _python_only = before


def is_python_only() -> bool:
    return _python_only


def address(array: NDArray[np.generic]) -> int:
    """Where a non-empty array's numbers are; the usual array.ctypes.data takes four times as long."""
    if not array.flags.writeable:
        return array.ctypes.data
    return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]


def takes(array: NDArray[np.generic]) -> bool:
    """Whether C++ may read it: int64 in C order, and not empty."""
    return array.dtype == np.int64 and array.flags.c_contiguous and array.size > 0


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "evenmoe"


@cache
def processor() -> str:
    """What -march=native depends on. Home folders are shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    with cpuinfo.open() as lines:
        wanted = (
            "model",
            "cpu family",
            "flags",
            "Features",
            "CPU part",
            "cpu",
            "isa",
            "uarch",
        )  # x86, ARM, POWER, RISC-V
        return "".join(line for _, line in zip(range(40), lines) if line.split("\t")[0].rstrip(": \n") in wanted)


@cache
def _loaded(library: Library) -> tuple[ctypes.CDLL | None, str]:
    """-> the library, where it is; or None, and why"""
    try:
        path = library.path
        if not path.exists():
            return None, f"{path.name} is not built; run python -m moe.build"
        if (problem := _distrust(path)) is not None:
            return None, problem
        loaded = ctypes.CDLL(str(path))
        for name, letters in library.functions.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = [_TYPES[letter] for letter in letters], ctypes.c_int64
        return loaded, str(path)
    except (OSError, RuntimeError) as failure:
        return None, f"it does not load ({failure})"


def _distrust(path: Path) -> str | None:
    """Why a binary is not run: whoever may write it would run what they like in this process."""
    about = path.stat()
    if about.st_uid not in (os.geteuid(), 0):
        return (
            f"{path} belongs to another user; set XDG_CACHE_HOME to a folder of your own, and run python -m moe.build"
        )
    if about.st_mode & stat.S_IWOTH:
        return f"everybody may write {path}; remove it, and run python -m moe.build"
    return None


_HERE = Path(__file__).parent
DECIDERS = Library(
    name="deciders",
    sources=(_HERE / "least_loaded.cpp", _HERE / "dual.cpp", _HERE / "top_k.cpp", _HERE / "waterfill.cpp"),
    functions={
        "evenmoe_least_loaded": "pnnpppnddp",
        "evenmoe_unlawful": "ppnn",
        "evenmoe_level": "pnnppn",
        "evenmoe_token_ends": "ppnnnppn",
        "evenmoe_expert_ends": "ppnnndppn",
        "evenmoe_top_k": "ppnnnppn",
    },
)
