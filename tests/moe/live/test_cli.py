"""moe-elastic: what operators ask, answered in one line of JSON or of reason."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli_elastic import app
from moe.comm import CoordinatorLostError, Membership, Server, ask, located
from moe.coordinator import Coordinator
from moe.roster import RefusedError
from tests.moe.live.member import even


def test_an_operator_is_answered_or_told_why_not(tmp_path: Path) -> None:
    """One that joins with a plan of its own is refused; one that leaves is safe to end."""
    server = Server(Coordinator(lease=30.0))
    server.save_address(tmp_path / "address")
    thread = server.start()
    at = ["--at", str(tmp_path / "address")]
    run = CliRunner().invoke
    member = Membership(tmp_path / "address", plan=even(6, 1).to_json())
    told = json.loads(run(app, ["status", "--json", *at]).stdout)
    assert (told["members"], told["phase"], told["epoch"]) == ([1], "IDLE", 1)
    operation = json.loads(run(app, ["scale", "2", "--op", "grow", "--json", *at]).stdout)
    assert operation == {"op": "grow", "scale": 2, "state": "pending", "reason": "waits for 1 more members to stand by"}
    waited = run(app, ["scale", "2", "--op", "grow", "--wait", "0.2", "--json", *at])
    assert waited.exit_code == 1
    assert json.loads(waited.stdout) == operation
    refused = run(app, ["drain", "1", *at])
    assert refused.exit_code == 2
    assert "'grow' is under way (WAIT); wait for it, or cancel it" in refused.stderr
    assert run(app, ["cancel", "grow", *at]).exit_code == 0
    assert "phase: IDLE" in run(app, ["status", *at]).stdout
    with pytest.raises(RefusedError, match="epoch 1 serves already"):
        Membership(tmp_path / "address", plan=even(6, 1).to_json())
    standing_by = Membership(tmp_path / "address", plan=None)
    assert json.loads(run(app, ["status", "--json", *at]).stdout)["safe_to_terminate"] == [2]
    standing_by.close()
    deadline = time.monotonic() + 20
    while len(ask(server.address, "status")["all"]) > 1:  # who left is forgotten once it hung up
        assert time.monotonic() < deadline
    planned = run(app, ["plan", "-o", str(tmp_path / "plan.json"), *at])
    assert (planned.exit_code, planned.stdout) == (0, f"written: {tmp_path / 'plan.json'}\n")
    placed = run(app, ["place", str(tmp_path / "plan.json"), "--op", "stay", "--json", *at])
    assert json.loads(placed.stdout)["state"] == "done"
    (tmp_path / "wide.json").write_text(even(6, 2).to_json())
    wide = run(app, ["place", str(tmp_path / "wide.json"), *at])
    assert "the plan is for 2 ranks; 1 members serve" in wide.stderr
    member.close()
    server.stop()
    thread.join()
    gone = run(app, ["status", *at])
    assert gone.exit_code == 2
    assert f"no coordinator answers at {server.address}" in gone.stderr


def test_nobody_there_is_one_line() -> None:
    done = CliRunner().invoke(app, ["status", "--at", "127.0.0.1:1"])
    assert done.exit_code == 2
    assert done.stderr.startswith("moe-elastic: ")
    with pytest.raises(CoordinatorLostError, match=r"no coordinator at 127\.0\.0\.1:1"):
        Membership("127.0.0.1:1", plan=None, timeout=0.2)
    assert "neither host:port" in CliRunner().invoke(app, ["status", "--at", "nowhere"]).stderr


def test_a_coordinator_started_by_command_says_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "address"
    words = [sys.executable, "-m", "moe.cli_elastic", "serve", "--file", str(file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert file.read_text().strip() == address
        assert json.loads(CliRunner().invoke(app, ["status", "--json", "--at", address]).stdout)["members"] == []
        assert "Address already in use" in CliRunner().invoke(app, ["serve", "--file", str(file)]).stderr
        process.kill()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == address
        process.kill()


def test_who_lacks_the_secret_is_neither_member_nor_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that comes back either: it is refused, and its steps go on."""
    monkeypatch.setenv("EVENMOE_SECRET", "ours")
    server = Server(Coordinator(lease=30.0))
    thread = server.start()
    member = Membership(server.address, plan=even(6, 1).to_json(), beat=0.05)
    for secret in ("theirs", ""):
        monkeypatch.setenv("EVENMOE_SECRET", secret)
        with pytest.raises(RefusedError, match="EVENMOE_SECRET is not set there, or not to the coordinator's"):
            Membership(server.address, plan=None)
        with pytest.raises(RefusedError, match="EVENMOE_SECRET"):
            ask(server.address, "status")
        with socket.create_connection(located(server.address)) as link, link.makefile("rwb") as stream:
            for message in ({"do": "again", "member": 1, "secret": secret}, {"do": "bye"}, {"do": "scale"}):
                stream.write(json.dumps(message).encode() + b"\n")
                stream.flush()
                assert "EVENMOE_SECRET" in json.loads(stream.readline())["refused"]
    monkeypatch.setenv("EVENMOE_SECRET", "ours")
    assert ask(server.address, "status")["members"] == [1]
    member.close()
    server.stop()
    thread.join()


def test_a_coordinator_that_others_can_reach_needs_a_secret_or_is_told_to_be_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("EVENMOE_SECRET", raising=False)
    refused = CliRunner().invoke(app, ["serve", "--bind", "0.0.0.0"])
    assert refused.exit_code == 2
    assert "0.0.0.0 can be reached from other machines; set EVENMOE_SECRET" in refused.stderr
    for words in ({"open_to_all": True}, {}):
        server = Server(Coordinator(), bind="0.0.0.0", **words)
        thread = server.start()
        server.stop()
        thread.join()
        monkeypatch.setenv("EVENMOE_SECRET", "ours")
