"""Under torchrun: who comes later has a launcher of its own, and nobody else's ranks are started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from moe.comm import ask
from tests.launched import ROOT

LIMIT = 120.0


@contextmanager
def launcher(*words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    whole = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment
    command = ["bash", "scripts/launch.sh", *words]
    with subprocess.Popen(command, cwd=ROOT, env=whole, text=True, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        with suppress(OSError, ValueError):
            if done():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finished(address: str, op: str, count: int) -> Callable[[], bool]:
    return lambda: ask(address, "scale", op=op, count=count)["state"] == "done"


def test_ranks_of_a_second_torchrun_join_those_of_the_first(tmp_path: Path) -> None:
    """No process is started again, no answer is wrong, and the coordinator ends with those it was started for."""
    address, worker = str(tmp_path / "address"), ["-m", "tests.moe.live.worker"]
    with launcher("--elastic", address, "2", *worker, "found", str(tmp_path)) as founders:
        until(lambda: len(ask(address, "status")["members"]) == 2)
        with launcher("1", *worker, "join", str(tmp_path), EVENMOE_COORDINATOR=address) as joiner:
            until(finished(address, "grow", 3))
            started = {path.name for kind in ("found", "join") for path in tmp_path.glob(f"{kind}-*")}
            until(finished(address, "shrink", 2))
            assert joiner.wait(LIMIT) == 0, joiner.communicate()
        ask(address, "scale", op="end", count=0)
        _, said = founders.communicate(timeout=LIMIT)
        assert founders.returncode == 0, said
    assert f"the coordinator is at {Path(address).read_text().strip()}" in said
    with pytest.raises(OSError):
        ask(address, "status")
    assert {path.name for kind in ("found", "join") for path in tmp_path.glob(f"{kind}-*")} == started
    told = [json.loads(path.read_text()) for path in tmp_path.glob("told-*")]
    assert [member["member"] for member in sorted(told, key=lambda member: int(member["member"]))] == [1, 2, 3]
    for member in told:
        assert (member["wrong"], member["retries"], member["error"]) == (0, 0, "")
        assert len(member["served"]) > 0


def test_a_launcher_without_ranks_says_how_it_is_used(tmp_path: Path) -> None:
    for words in ([], ["--elastic"], ["--elastic", str(tmp_path / "address"), "2"]):
        with launcher(*words) as process:
            assert process.wait(LIMIT) == 2
            assert "usage: scripts/launch.sh [--elastic FILE] RANKS" in process.communicate()[1]
