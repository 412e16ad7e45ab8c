"""How busy other programs are: what this one started is not another, ended or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.foreign import Foreign

CHILD = """
import subprocess, sys
burn = "import time\\nwhile time.process_time() < 0.5: pass"
subprocess.run([sys.executable, "-c", burn], check=True)
print("ended", flush=True)
sys.stdin.read()
"""


def test_the_time_of_a_child_s_child_that_ended_is_not_another_program_s() -> None:
    """As of workers that a server for forks started: it waits for them, not this process."""
    if not Path("/proc/stat").exists():
        pytest.skip("the system does not tell")
    foreign = Foreign()
    _, before, _ = foreign._now()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ended\n"
        _, after, _ = foreign._now()
        process.communicate("")
    assert after - before > 0.4 * os.sysconf("SC_CLK_TCK")
