"""The documents: what they show of Python is Python, and every name they import is there."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("placement", "routing", "moe")


def blocks(page: Path, language: str) -> Iterator[str]:
    for fence in re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield dedent(fence)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_shown_of_python_is_python_and_imports_what_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
                if "integrations" in node.module:
                    pytest.importorskip(node.module, reason=f"the host of {node.module} is not installed")
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    named = re.findall(r"`((?:scripts|examples|tests|docs)/[\w/.]+\.(?:py|md|sh|slurm|npz|png))`", text)
    missing = [link for link in linked if not (page.parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_every_module_that_a_page_runs_is_there() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    modules = set(re.findall(r"-m (scripts(?:\.\w+)+)", text))
    assert modules
    assert not [module for module in modules if not (ROOT / (module.replace(".", "/") + ".py")).exists()]
