"""What is released: a wheel that holds every module, and works where nothing of this repository lies around."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("placement", "routing", "moe")
SMOKE = """
import importlib.metadata, pathlib, sys
import torch
import moe, placement, routing
folder = pathlib.Path(sys.argv[1])
assert all(pathlib.Path(package.__file__).is_relative_to(folder) for package in (moe, placement, routing))
assert all((folder / package / "py.typed").exists() for package in ("moe", "placement", "routing"))
assert importlib.metadata.version("evenmoe") == sys.argv[2]
layer = moe.MoE(moe.MoEConfig(dim=8, hidden=16, num_experts=4, top_k=2))
layer(torch.randn(5, 8)).sum().backward()
moe.settle_prices(layer)
trace = placement.LoadTrace.load(sys.argv[3])
topology = placement.Topology.fitting(num_experts=trace.num_experts, ranks=4, ranks_per_node=4)
plan = placement.Packed()(trace, topology)
assert not any(verdict.faults for verdict in placement.verify(plan, trace))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="build is not installed; pip install 'evenmoe[dev]'")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(["-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)])
    return next(out.glob("evenmoe-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(
        [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--target",
            str(target),
            str(wheel),
        ]
    )
    return target


def run(words: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(sys.executable).parent,  # not here: the packages of this folder would be found first
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_module(installed: Path) -> None:
    for package in PACKAGES:
        modules = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        assert {path.relative_to(installed) for path in (installed / package).rglob("*.py")} == modules


def test_what_the_wheel_installs_routes_computes_and_plans(installed: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    trace = str(ROOT / "examples" / "stdlib_trace.npz")
    run(["-c", SMOKE, str(installed), version, trace], PYTHONPATH=str(installed))


def test_every_command_of_the_wheel_says_what_it_does(installed: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {path.name for path in (installed / "bin").iterdir()} == set(scripts)
    for name in scripts:
        assert "Usage" in run([str(installed / "bin" / name), "--help"], PYTHONPATH=str(installed))
