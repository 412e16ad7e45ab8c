"""What comes from elsewhere is read, never run; and a store of a coordinator is there for those it is meant for."""

from __future__ import annotations

import os
import pickle
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe.comm import Membership, Peers, Shelf, ask
from moe.comm.process import is_alive, is_here
from moe.comm.serve import Server
from moe.comm.standby import store_server
from moe.comm.store import write_tensors
from moe.coordinator import Coordinator
from moe.roster import RefusedError
from tests.moe.live.member import even

pytestmark = pytest.mark.fast


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_the_metadata_of_a_checkpoint_cannot_run_anything(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(ValueError, match="no record of a checkpoint"):
        Shelf(tmp_path)
    assert not mark.exists()
    write_tensors(
        {"one": torch.arange(3.0), "two": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "y", Peers.of(None)
    )
    assert Shelf(tmp_path / "y").read("one").tolist() == [0, 1, 2]


def test_a_store_listens_where_it_is_told_to_and_nowhere_else() -> None:
    store = store_server("127.0.0.1")
    socket.create_connection(("127.0.0.1", store.port), 5).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", store.port), 5)


def _place(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)


def test_a_caller_that_hangs_up_at_once_does_not_end_the_service() -> None:
    server = Server(Coordinator(lease=30.0))
    server._accept()  # nobody is there any more
    server.start()
    socket.create_connection(_place(server.address), 5).close()
    assert ask(server.address, "status")["members"] == []
    server.stop()


def test_a_member_of_a_process_with_a_thousand_open_files_is_heard() -> None:
    """select.select() takes no descriptor above 1023: the line would fall silent, and its member be given up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"a process here may have {hard} open files")
    server = Server(Coordinator(lease=30.0))
    server.start()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    taken: list[int] = []
    try:
        while not taken or taken[-1] < 1024:
            taken.append(os.dup(0))
        member = Membership(server.address, plan=even(2, 1).to_json(), beat=0.05, timeout=20.0)
        member.steps = 7
        deadline = time.monotonic() + 20
        while server.coordinator.roster.members[1].step != 7 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.coordinator.roster.members[1].step == 7
        member.close()
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        server.stop()


def test_who_is_refused_leaves_no_thread_behind() -> None:
    server = Server(Coordinator(lease=30.0))
    server.start()
    with pytest.raises(RefusedError):
        Membership(server.address, plan="no plan", beat=0.05, timeout=20.0)
    server.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "membership"]


def test_a_process_that_says_nothing_of_itself_is_not_here() -> None:
    assert not is_here({"pid": 1})
    assert not is_alive({})
