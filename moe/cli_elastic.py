"""moe-elastic: the coordinator of a live model, and what operators ask of it.

Exit codes: 0 done, or taken on where there was no --wait; 1 the answer is no (an operation was called off, or was not
done within --wait; it goes on, and the same --op asks after it); 2 what was asked for cannot be, in one line.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.comm import Server, ask, located
from moe.coordinator import Coordinator

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
At = Annotated[str, typer.Option(help="Where the coordinator is: host:port, or the file that holds it.")]
Op = Annotated[str, typer.Option(help="A name for this request; asked again under it, it is done once.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait until it is done, or exit 1; 0 not to wait.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON.")]


@app.command()
def serve(
    *,
    bind: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for that in --file, if it is there, else for any free one.")] = 0,
    file: Annotated[Path | None, typer.Option(help="Where to write the address, for members to find.")] = None,
    open_to_all: Annotated[bool, typer.Option("--open", help="Where others can reach it, without a secret.")] = False,
    lease: Annotated[float, typer.Option(help="Seconds of silence after which a member is dead.")] = 5.0,
    report: Annotated[float, typer.Option(help="Seconds beyond a lease until a survivor must have noticed.")] = 60.0,
) -> None:
    """The coordinator: outside of all workers, so that any of them may die. It ends when it is killed.

    Started anew where it was, it goes on with the members that run. EVENMOE_SECRET, if it is set, must be the same for
    members and operators.
    """
    with _errors_in_one_line():
        if file is not None and file.exists():
            port = port or located(file)[1]
        coordinator = Coordinator(lease=lease, report=report)
        server = Server(coordinator, bind=bind, port=port, open_to_all=open_to_all)
        if file is not None:
            server.save_address(file)
    typer.echo(server.address)
    server.serve()


@app.command()
def status(*, at: At, as_json: Json = False) -> None:
    """Who serves, how far a change is, and whose end would cost nothing."""
    with _errors_in_one_line():
        _show(ask(at, "status"), as_json)


@app.command()
def scale(
    members: Annotated[int, typer.Argument(help="How many are to serve; 0 ends the service.")],
    *,
    at: At,
    op: Op = "",
    wait: Wait = 0.0,
    as_json: Json = False,
) -> None:
    """So many members. It waits for new ones to stand by, and moves the fewest experts it can."""
    with _errors_in_one_line():
        _follow(partial(ask, at, "scale", op=op or _any_name(), count=members), wait, as_json)


@app.command()
def drain(
    members: Annotated[list[int], typer.Argument(help="Their numbers, as status tells them.")],
    *,
    at: At,
    op: Op = "",
    wait: Wait = 0.0,
    as_json: Json = False,
) -> None:
    """These members go, once others have their experts."""
    with _errors_in_one_line():
        _follow(partial(ask, at, "drain", op=op or _any_name(), members=members), wait, as_json)


@app.command()
def plan(*, at: At, output: Annotated[Path, typer.Option("-o", "--output", help="Where to write it.")]) -> None:
    """Where experts live, as a plan for moe-place; its ranks are the members that status lists, in their order."""
    with _errors_in_one_line():
        output.write_text(ask(at, "plan")["plan"])
        typer.echo(f"written: {output}")


@app.command()
def place(
    file: Annotated[Path, typer.Argument(help="A plan, as moe-place makes it, for as many ranks as members.")],
    *,
    at: At,
    op: Op = "",
    wait: Wait = 0.0,
    as_json: Json = False,
) -> None:
    """The same members, and their experts where the plan has them."""
    with _errors_in_one_line():
        _follow(partial(ask, at, "place", op=op or _any_name(), plan=file.read_text()), wait, as_json)


@app.command()
def cancel(name: Annotated[str, typer.Argument(help="Of the operation.")], *, at: At, as_json: Json = False) -> None:
    """Call an operation off, as long as nobody has changed over."""
    with _errors_in_one_line():
        _show(ask(at, "cancel", op=name), as_json)


def _follow(asked: Callable[[], dict[str, Any]], wait: float, as_json: bool) -> None:
    """Asked again under its name, an operation is not done again but tells how far it is."""
    deadline, operation = time.monotonic() + wait, asked()
    while operation["state"] in ("pending", "running") and time.monotonic() < deadline:
        time.sleep(0.1)
        operation = asked()
    _show(operation, as_json)
    if operation["state"] == "aborted" or (wait > 0 and operation["state"] != "done"):
        raise typer.Exit(1)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if name == "all":
            for member in value:
                typer.echo(
                    f"  member {member['member']}: {member['state']}, step {member['step']} {member['reason']}".rstrip()
                )
        else:
            typer.echo(f"{name}: {value}")


def _any_name() -> str:
    return uuid.uuid4().hex[:12]


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"moe-elastic: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
