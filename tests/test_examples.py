"""Every example runs as its first lines say, on one process or under torchrun."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launched import ROOT, launched

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = [
    (path.name, line.split())
    for path in EXAMPLES
    for line in re.findall(rf"^\s*((?:python|torchrun) \S.*?{path.name})", path.read_text(), re.MULTILINE)
]

NEEDS = {"06_hugging_face.py": "transformers", "07_megatron.py": "megatron", "08_deepspeed.py": "deepspeed"}


def run(command: Sequence[str]) -> str:
    return output(tuple(command))


@cache  # several tests read what an example printed
def output(command: tuple[str, ...]) -> str:
    module = ["-m", "torch.distributed.run"] if command[0] == "torchrun" else []
    done = launched([*module, *command[1:]])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def need(name: str) -> None:
    """Looked for and not imported: what a host warns of while it is imported is no error here."""
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed; pip install 'evenmoe[dev]'")


def test_every_example_says_how_to_run_it() -> None:
    assert {name for name, _ in COMMANDS} == {path.name for path in EXAMPLES}


@pytest.mark.parametrize("name, command", COMMANDS, ids=[" ".join([*command[:1], name]) for name, command in COMMANDS])
def test_the_example_runs(name: str, command: list[str]) -> None:
    need(name)
    assert run(command).strip()


def test_the_drop_in_example_trains_alike_on_one_process_and_on_four() -> None:
    alone, together = (run(command) for name, command in COMMANDS if name == "01_drop_in.py")
    assert alone == together


def test_the_hugging_face_example_trains_alike_on_one_process_and_on_two() -> None:
    need("06_hugging_face.py")
    alone, together = (run(command) for name, command in COMMANDS if name == "06_hugging_face.py")
    assert together.startswith(alone)
    assert together.count("of the checkpoint") == 2


def test_the_deepspeed_example_trains_alike_on_one_process_and_on_four() -> None:
    need("08_deepspeed.py")
    said = [run(command).splitlines() for name, command in COMMANDS if name == "08_deepspeed.py"]
    alone, together = ([line for line in lines if "loss" in line] for lines in said)
    assert alone == together
    assert len(alone) == 5


def test_the_fsdp_example_trains_alike_on_one_process_and_on_four() -> None:
    alone, together = (run(command) for name, command in COMMANDS if name == "09_fsdp.py")
    assert alone == together


def test_the_demo_proves_what_it_shows(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    out = run(f"torchrun --standalone --nproc-per-node 4 scripts/demo.py --tokens 48 --picture {picture}".split())
    assert "equal the single-process reference" in out
    assert picture.stat().st_size > 5000
    assert re.search(r"least-loaded .* 1\.\d\d +\d", out)
