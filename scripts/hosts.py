"""Hosts: several machines made of network namespaces on this one, joined by links of limited speed that can be cut.

Needs Linux, root and `ip` and `tc` (iproute2); `why_not()` says what is missing. Each host has a name, an address and a
network of its own, so the programs on it find neither this machine's ports nor one another but through the link.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


def why_not() -> str | None:
    """Why hosts cannot be made here, if they cannot."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "network namespaces need Linux"
    if missing := [tool for tool in ("ip", "tc", "unshare", "hostname") if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    name = f"em{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    try:
        for words in (["link", "add", "v0", "type", "veth", "peer", "name", "v1"], ["link", "set", "lo", "up"]):
            done = subprocess.run(["ip", "-n", name, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                return f"virtual links are not permitted: {done.stderr.strip()}"
        limit = ("tc", "qdisc", "add", "dev", "v0", "root", "tbf", "rate", "1gbit", "burst", "64kb", "latency", "1ms")
        done = subprocess.run(["ip", "netns", "exec", name, *limit], capture_output=True, text=True, check=False)
        return f"links cannot be slowed: {done.stderr.strip()}" if done.returncode else None
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


class Hosts:
    """`count` hosts, host0, host1, ..., at address(0), address(1), ..., each joined to a switch by a link of its own.

    with Hosts(2, mbit=500) as hosts:
        process = hosts.start(0, ["python", "-c", "print(1)"], {})
        hosts.cut(0)

    What was started is killed and everything made is removed at the end.
    """

    def __init__(self, count: int, *, mbit: int, delay_ms: float = 0.0) -> None:
        if (problem := why_not()) is not None:
            raise ValueError(f"no hosts can be made: {problem}")
        self.count, self._mark = count, uuid.uuid4().hex[:6]
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self._make(mbit, delay_ms)
        except BaseException:
            self.close()
            raise

    def _make(self, mbit: int, delay_ms: float) -> None:
        switch = self._name("s")
        _run(["ip", "netns", "add", switch])
        _ip(switch, "link", "add", "br0", "type", "bridge")
        _ip(switch, "link", "set", "br0", "up")
        for host in range(self.count):
            space = self._name(str(host))
            _run(["ip", "netns", "add", space])
            _ip(space, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{host}", "netns", switch)
            _ip(switch, "link", "set", f"p{host}", "master", "br0", "up")
            _ip(space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip(space, "link", "set", device, "up")
            for where, device in ((space, "eth0"), (switch, f"p{host}")):
                latency = f"{50 + delay_ms:g}ms"
                limit = f"tc qdisc add dev {device} root tbf rate {mbit}mbit burst 256kb latency {latency}"
                _run(["ip", "netns", "exec", where, *limit.split()])

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def start(self, host: int, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        """A program on a host, with gloo told to use its link. Its output is to be read from its stdout."""
        inside = f'hostname host{host} && exec "$@"'
        words = ["ip", "netns", "exec", self._name(str(host)), "unshare", "--uts", "sh", "-c", inside, "sh", *command]
        process = subprocess.Popen(
            words,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def torchrun(self, ranks: int, words: Sequence[str], environment: dict[str, str]) -> list[subprocess.Popen[str]]:
        """`words` under torchrun on every host, `ranks` on each, as one job."""
        launch = ["-m", "torch.distributed.run", "--nnodes", str(self.count), "--nproc-per-node", str(ranks)]
        meet = ["--master-addr", self.address(0), "--master-port", "29400"]  # free: the network is this host's own
        return [
            self.start(host, [sys.executable, *launch, "--node-rank", str(host), *meet, *words], environment)
            for host in range(self.count)
        ]

    def cut(self, host: int) -> None:
        """Nothing comes to this host or leaves it, and nobody is told: a pulled cable."""
        _ip(self._name("s"), "link", "set", f"p{host}", "down")

    def mend(self, host: int) -> None:
        _ip(self._name("s"), "link", "set", f"p{host}", "up")

    def close(self) -> None:
        for process in self._processes:
            _kill(process)
        for name in ["s", *map(str, range(self.count))]:
            subprocess.run(["ip", "netns", "delete", self._name(name)], capture_output=True, check=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _name(self, what: str) -> str:
        return f"em{self._mark}{what}"


def _kill(process: subprocess.Popen[str]) -> None:
    """The program and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _ip(space: str, *words: str) -> None:
    _run(["ip", "-n", space, *words])


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
