"""Processes of this machine, told apart even if a number is used again."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """host: of machine and container, as numbers of processes mean something only there."""
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_here(process: Mapping[str, Any]) -> bool:
    return bool(process) and process.get("host") == _host()


def is_alive(process: Mapping[str, Any]) -> bool:
    """Of a process that is_here."""
    started = _started(process.get("pid", 0))
    return started is not None and bool(started == process.get("started"))


def has_ended(process: Mapping[str, Any]) -> bool:
    """It ran here, and does no more. Of another machine nobody knows."""
    return is_here(process) and not is_alive(process)


def kill(process: Mapping[str, Any]) -> None:
    """At once, whatever it does: a stopped one too."""
    if is_here(process) and is_alive(process):
        os.kill(process["pid"], signal.SIGKILL)


def spare(process: Mapping[str, Any]) -> None:
    """Kill nobody: whoever is fenced is refused, and that must do."""


def _host() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    marks = [boot.read_text().strip()] if boot.exists() else []
    marks += [str(namespace.readlink())] if namespace.exists() else []
    return "/".join([socket.gethostname(), *marks])


def _started(pid: int) -> int | None:
    """When it began, in ticks since boot; None of one that has ended, even if nobody asked for its exit code yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
