"""The rules of the house: who imports whom, who talks to the network, how long a file and a function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
PACKAGES = ("placement", "routing", "moe")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted(path for folder in ("scripts", "examples") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_packages_import_downwards_and_through_their_roots(path: Path) -> None:
    """moe -> routing -> placement, never back; another package is known by its root alone."""
    package = path.relative_to(ROOT).parts[0]
    below = PACKAGES[: PACKAGES.index(package)]
    for module in imports(path):
        root = module.split(".")[0]
        if root in PACKAGES and root != package:
            assert root in below, f"{package} must not import {module}"
            assert module == root, f"import from {root}, not from {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_moe_comm_talks_to_torch_distributed(path: Path) -> None:
    talks = any(module.startswith("torch.distributed") for module in imports(path))
    assert not talks or "comm" in path.parts


@pytest.mark.parametrize("path", [path for path in SOURCES if "placement" in path.parts], ids=name)
def test_placement_needs_no_torch(path: Path) -> None:
    """A reader of an engine's format may import it, in the function that needs it."""
    assert not any(module.split(".")[0] == "torch" for module in imports(path, top_level_only=True))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_deciders_in_numpy_stay_in_numpy(path: Path) -> None:
    numpy_only = (
        "assignment.py",
        "assigner.py",
        "least_loaded.py",
        "copies.py",
        "nearest_copy.py",
        "waterfill.py",
        "native.py",
    )
    if path.parent.name == "routing" and path.name in numpy_only:
        assert not any(module.split(".")[0] == "torch" for module in imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_integrations_are_imported_by_nobody(path: Path) -> None:
    if "integrations" not in path.parts:
        assert not any("integrations" in module for module in imports(path))


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=name)
def test_a_file_holds_one_idea_and_a_function_fits_a_screen(path: Path) -> None:
    text = path.read_text()
    limit = 80 if "examples" in path.parts else 300
    assert text.count("\n") <= limit, f"{text.count(chr(10))} lines; over {limit} it holds two ideas"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_there_is_no_drawer_for_odds_and_ends(path: Path) -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {part.removesuffix(".py") for part in path.parts}


@pytest.mark.parametrize("folder", sorted({path.parent for path in (ROOT / "tests").rglob("test_*.py")}), ids=name)
def test_every_test_folder_is_a_package(folder: Path) -> None:
    """With only some of them, `import moe` would find the tests."""
    assert (folder / "__init__.py").exists()


def test_whoever_trains_needs_no_solver() -> None:
    """From the package roots no import reaches PuLP but one inside a function: a machine for training may lack it."""
    seen: set[Path] = set()
    left = [ROOT / package / "__init__.py" for package in PACKAGES]
    while left:
        path = left.pop()
        seen.add(path)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            assert not {module.split(".")[0] for module in modules} & {"pulp", "highspy"}, name(path)
            files = [ROOT / Path(*module.split(".")).with_suffix(".py") for module in modules]
            left += [file for file in files if file.exists() and file not in seen]
