"""moe-place migrate, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement import Packed, Plan, RoundRobin, Topology
from tests.placement.strategies import drawn_loads
from tests.placement.test_cli import facts, run

pytestmark = pytest.mark.fast


@pytest.fixture
def running(tmp_path: Path) -> Path:
    RoundRobin()(drawn_loads(0, layers=2), Topology.even(ranks=4, slots=9, ranks_per_node=2)).save(tmp_path / "running")
    return tmp_path / "running"


def test_to_a_plan_its_moves_are_those_that_diff_counts(tmp_path: Path, running: Path) -> None:
    Packed()(drawn_loads(3, layers=2), Topology.even(ranks=4, slots=9, ranks_per_node=2)).save(tmp_path / "wanted")
    said = facts("migrate", running, tmp_path / "wanted", "-o", tmp_path / "named")
    assert facts("diff", running, tmp_path / "named")["moves"] == said["moves"]
    assert said["moves"] == sum(len(wave["moves"]) for wave in said["waves"])
    plain = facts("migrate", running, tmp_path / "wanted", "--keep-names", "-o", tmp_path / "same")
    assert plain["moves"] == facts("diff", running, tmp_path / "wanted")["moves"] >= said["moves"]
    assert Plan.load(tmp_path / "same").fingerprint == Plan.load(tmp_path / "wanted").fingerprint


def test_to_a_machine_of_more_ranks_each_new_rank_fetches_its_share(tmp_path: Path, running: Path) -> None:
    machine = ("--nodes", 3, "--ranks-per-node", 2, "--slots", 9)
    sizes = ("--expert-mb", 10, "--boundary-mb", 20)
    said = facts("migrate", running, *machine, *sizes, "-o", tmp_path / "wider")
    assert said["moves"] == 2 * (32 - 4 * 6 + 2)
    assert said["megabytes"] == said["moves"] * 10
    assert said["boundaries"] >= 5
    assert Plan.load(tmp_path / "wider").ranks == 6
    assert "across_nodes" in run("migrate", running, *machine, "-o", tmp_path / "wider")


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "give either a plan to go to, or the new machine"),
        (("--nodes", 1), "a new machine needs all of"),
        (("--nodes", 1, "--ranks-per-node", 2, "--slots", 9), "32 experts do not fit 2 ranks with 18 slots in all"),
        (("--nodes", 2, "--ranks-per-node", 2, "--slots", 9, "--keep-names"), "--keep-names is about a target plan"),
        (("--nodes", 2, "--ranks-per-node", 2, "--slots", 9, "--boundary-mb", 5), "--boundary-mb needs --expert-mb"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, running: Path, words: tuple[object, ...], message: str) -> None:
    assert message in run("migrate", running, *words, "-o", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()
