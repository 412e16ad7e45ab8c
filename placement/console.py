"""What moe-place shows: tables, progress, JSON, and one line for an error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

OUT, ERR = Console(), Console(stderr=True)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Whatever the caller gave that cannot be: one line on stderr, exit 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError):
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        else:
            reason = " ".join(str(error).split())
        ERR.print(f"moe-place: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def working(what: str) -> Iterator[Progress]:
    """A bar on a terminal's stderr while something runs; gone when it is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield progress


def emit(document: Mapping[str, Any]) -> None:
    """One line of JSON on stdout; a number that JSON does not know becomes null."""
    typer.echo(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table of which nothing is cut off: headings break into lines first, and one still too wide runs over."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        widest = max((len(row[index]) for row in cells), default=0)
        table.add_column(column, justify="left" if index == 0 else "right", min_width=widest, overflow="fold")
    for row in cells:
        table.add_row(*row)
    OUT.print(table, crop=False)


def say(text: str) -> None:
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def new_file(path: Path, *, sidecar: bool = False) -> Path:
    """A path that can be written to, and its sidecar's as well, said before any work is done."""
    for target in (path, Path(f"{path}.sidecar.json")) if sidecar else (path,):
        folder = target.absolute().parent
        if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{target}: cannot write there; give a file in a folder that exists and can be written to")
    return path
