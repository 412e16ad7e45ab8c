"""moe-doctor: run a training script under examination.

moe-doctor [--steps 5] [--json] train.py --its --arguments, or -m package.train; under torchrun: torchrun ... -m
moe.doctor train.py. Every model with MoE blocks that the script calls is watched; after so many steps of its optimiser
the script is stopped.

Exit codes: 0 nothing found; 1 something found; 2 misuse, or the script failed or had no MoE block, with the reason.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakSet

import typer
from torch import nn

from moe.comm import EVERYONE, Peers
from moe.comm.parting import before_parting
from moe.doctor.attend import recomputing
from moe.doctor.hosts import find_blocks
from moe.doctor.session import Examination
from moe.doctor.symptom import Report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class _Enough(BaseException):
    """So many steps were seen. Not an Exception, so that a script that catches those lets it pass."""


class Ambulance:
    """Looks at every module that is called, and examines those with MoE blocks."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.known: WeakSet[nn.Module] = WeakSet()
        self.examinations: list[Examination] = []
        self.rank = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.meet(module)
            return original(module, *args, **kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def meet(self, module: nn.Module) -> None:
        if module not in self.known:
            self.known |= set(module.modules())
            if find_blocks(module):
                self.examinations.append(Examination(module))
        elif self.enough and not recomputing():
            raise _Enough

    @property
    def enough(self) -> bool:
        return bool(self.examinations) and max(each.steps for each in self.examinations) >= self.steps

    def conclude(self, *, alone: bool = False) -> list[Report]:
        self.rank = Peers.of(EVERYONE).rank or self.rank
        return [examination.conclude(alone=alone) for examination in self.examinations]


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False}, help=__doc__)
def run(
    words: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGUMENTS]...", help="the script and what it takes")],
    *,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module")] = False,
    steps: Annotated[int, typer.Option(min=1, help="stop after so many steps of the optimiser")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON; the script's own output goes to stderr")] = False,
) -> None:
    script, arguments = words[0], [word for at, word in enumerate(words[1:]) if at or word != "--"]
    if not module and not Path(script).is_file():
        _stop(f"there is no script {script}; name a file, or a module with -m")
    ambulance = Ambulance(steps)
    failure = _under_watch(ambulance, script, arguments, module, as_json)
    reports = ambulance.conclude(alone=failure is not None)
    if ambulance.rank == 0:
        _print(reports, as_json)
    if failure is not None:
        _stop(f"{script} failed: {failure}")
    if not reports:
        _stop(f"{script} called no model with MoE blocks that the doctor knows; see doctor(model, blocks=[...])")
    raise typer.Exit(0 if all(report.clean for report in reports) else 1)


def _under_watch(ambulance: Ambulance, script: str, arguments: list[str], module: bool, quiet: bool) -> str | None:
    """Run it. -> why it failed, None if it did not"""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path.cwd()) if module else str(Path(script).resolve().parent))
    try:
        with ExitStack() as stack:
            if quiet:
                stack.enter_context(redirect_stdout(sys.stderr))
            stack.enter_context(before_parting(ambulance.conclude))
            stack.enter_context(ambulance.waiting())
            (runpy.run_module if module else runpy.run_path)(script, run_name="__main__")
    except _Enough:
        return None
    except SystemExit as leave:
        return None if leave.code in (None, 0) else f"exit {leave.code}"
    except Exception as error:
        import traceback

        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        sys.argv, sys.path[:] = argv, path
    return None


def _print(reports: list[Report], as_json: bool) -> None:
    if as_json:
        print(json.dumps([report.facts() for report in reports], indent=1))
        return
    for report in reports:
        report.show()


def _stop(why: str) -> None:
    print(f"moe-doctor: {why}", file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    app()
