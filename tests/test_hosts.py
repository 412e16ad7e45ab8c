"""More than one host, made of network namespaces: who lives where is seen, and what a cut link does is bounded."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.hosts import Hosts, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no hosts can be made: {REASON}")
ROOT = Path(__file__).parent.parent
STEPS = 12
OURS = re.compile("nodes|step")  # torch has warnings of its own to say


def launch(hosts: Hosts, seconds: float) -> list[subprocess.Popen[str]]:
    """Two ranks on each of two hosts."""
    where = {"WORLD_SIZE": "4", "MASTER_ADDR": hosts.address(0), "MASTER_PORT": "29400", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tests.on_hosts", str(STEPS), str(seconds)]
    return [hosts.start(rank // 2, words, where | {"RANK": str(rank)}) for rank in range(4)]


def read_until(process: subprocess.Popen[str], start: str) -> list[str]:
    """The lines it says, up to one that starts so."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(start):
            return lines
    raise AssertionError("\n".join(lines))


def ends(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, list[str]]]:
    return [(rank.wait(timeout=120), (rank.stdout.read() if rank.stdout else "").splitlines()) for rank in ranks]


def test_hosts_are_told_apart_and_a_link_cut_for_a_moment_changes_nothing() -> None:
    said = []
    for cut in (False, True):
        with Hosts(2, mbit=1000) as hosts:
            ranks = launch(hosts, seconds=60)
            early = read_until(ranks[0], "step 3:")
            if cut:
                hosts.cut(1)
                time.sleep(1.5)  # how long the cable is out
                hosts.mend(1)
            codes, rest = zip(*ends(ranks), strict=True)
            assert codes == (0, 0, 0, 0), rest
            said.append([[line for line in lines if OURS.match(line)] for lines in ([*early, *rest[0]], *rest[1:])])
    assert said[0] == said[1]
    assert said[0][0][0] == "nodes [0, 0, 1, 1]"


def test_a_link_cut_for_good_is_an_error_on_every_rank_within_the_time_out() -> None:
    with Hosts(2, mbit=1000) as hosts:
        ranks = launch(hosts, seconds=8)
        read_until(ranks[0], "step 3:")
        hosts.cut(1)
        cut_at = time.monotonic()
        ended = ends(ranks)
        taken = time.monotonic() - cut_at
    for code, lines in ended:
        assert code != 0
        assert f"step {STEPS - 1}:" not in "\n".join(lines)
    assert taken < 100  # a bound on hanging, not on speed: the group's time-out, and slow processes
