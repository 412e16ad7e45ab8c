"""Three hosts, each a network namespace of its own, and a cable that is pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from tests.moe.live.member import even
from tests.moe.live.service import Service
from tests.moe.live.test_death import LEASE, assert_unharmed

HOSTS = 3


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, timeout=20)


@contextmanager
def network() -> Iterator[tuple[str, list[str]]]:
    """A bridge with the coordinator's address, and a namespace for each host. -> (that address, their names)"""
    mark = os.getpid() % 10000
    bridge, prefix = f"emb{mark}", f"10.{100 + mark % 100}.{mark // 100}"
    names = [f"em{mark}h{host}" for host in range(HOSTS)]
    with ExitStack() as undo:
        ip(f"link add {bridge} type bridge")
        undo.callback(ip, f"link del {bridge}")
        ip(f"addr add {prefix}.1/24 dev {bridge}")
        ip(f"link set {bridge} up")
        for host, name in enumerate(names):
            ip(f"netns add {name}")
            undo.callback(ip, f"netns del {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master {bridge} up")
            ip(f"-n {name} addr add {prefix}.{10 + host}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield f"{prefix}.1", names


def test_hosts_that_lose_one_another_go_on_without_the_one_that_is_cut_off() -> None:
    """No process ends and nobody can kill it: silence is all there is. What it held comes from backups. When its cable
    is back, it is refused."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    with ExitStack() as stack:
        try:
            address, names = stack.enter_context(network())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
        service = stack.enter_context(
            Service(0, experts=8, lease=LEASE, fences=False, start=False, bind=address, backup=True, timeout=8.0)
        )
        for name in names:
            service.start(replace(service.part, plan=even(8, HOSTS), network=name))
        service.hear(HOSTS)
        service.backed_up()
        service.steps(3)
        cut = next(name for name, process in zip(names, service.processes) if process.pid == service.pid_of[HOSTS])
        ip(f"link set {cut} down")
        service.until(lambda: service.status()["safe_to_terminate"] == [HOSTS])
        service.until(lambda: service.status()["phase"] == "IDLE")
        service.steps(3)
        ip(f"link set {cut} up")
        service.until(lambda: service.heard(HOSTS))
        told = service.end()
    assert "FencedError" in told[HOSTS].error
    assert told[HOSTS].wrong == 0
    assert_unharmed({member: seen for member, seen in told.items() if member != HOSTS})
