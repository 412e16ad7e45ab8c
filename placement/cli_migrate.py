"""moe-place migrate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from placement import options
from placement.console import emit, errors_in_one_line, new_file, say, show, working
from placement.files import write_all
from placement.formats import sidecar
from placement.migrate import Migration
from placement.migrate import migrate as planned
from placement.plan import Plan
from placement.rename import as_given, rename
from placement.topology import Topology


def migrate(
    running: options.PlanFile,
    target: Annotated[Path | None, typer.Argument(help="The plan to go to; without one, say the new machine.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the plan goes that is reached.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the new machine.")] = 0,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks (GPUs) of one of its nodes.")] = 0,
    slots: Annotated[str, typer.Option(help="Expert slots of its ranks, as for plan; a rank of 0 is emptied.")] = "",
    keep_names: Annotated[bool, typer.Option("--keep-names", help="The target's ranks as they are named.")] = False,
    spare: Annotated[int, typer.Option(help="Experts a rank may hold for a moment beyond before and after.")] = 1,
    expert_mb: Annotated[float, typer.Option(help="MB of an expert with all that moves along.")] = 0.0,
    boundary_mb: Annotated[float, typer.Option(help="MB a rank may send or receive between two steps.")] = 0.0,
    as_json: options.Json = False,
) -> None:
    """The fewest moves from the running plan to another, or to another machine, in waves that fit its memory."""
    with errors_in_one_line():
        new_file(out, sidecar=True)
        start = Plan.load(running)
        machine = _machine(start, target, nodes, ranks_per_node, slots)
        if machine is not None and keep_names:
            raise ValueError("--keep-names is about a target plan's ranks; none was given")
        if boundary_mb and not expert_mb:
            raise ValueError("--boundary-mb needs --expert-mb, the size of an expert")
        weight = max(round(expert_mb * 1e6), 1)
        with working("planning"):
            made = planned(
                start,
                Plan.load(target) if target is not None and machine is None else machine or start,
                byte_L=(weight,) * len(start.placement_L),
                spare=spare,
                naming=as_given if keep_names else rename,
            )
            boundaries = sum(1 for _ in made.boundaries(boundary_mb * 1e6)) if boundary_mb else None
        write_all({out: made.target.to_json().encode(), Path(f"{out}.sidecar.json"): sidecar(made.target, "plan")})
    facts = _facts(made, boundaries, expert_mb)
    if as_json:
        waves = [{"layer": start.layer_L[w.layer], "moves": [asdict(m) for m in w.move_N]} for w in made.wave_N]
        emit({**facts, "waves": waves})
    else:
        show("migration", ("measure", "value"), [[k, "unknown" if v is None else v] for k, v in facts.items()])
        say(f"written to {out}")


def _machine(start: Plan, target: Path | None, nodes: int, ranks_per_node: int, slots: str) -> Topology | None:
    """The machine on the command line, None where a plan is given instead."""
    named = bool(nodes or ranks_per_node or slots)
    if named == (target is not None):
        raise ValueError("give either a plan to go to, or the new machine: --nodes, --ranks-per-node and --slots")
    if not named:
        return None
    if not (nodes and ranks_per_node and slots):
        raise ValueError("a new machine needs all of --nodes, --ranks-per-node and --slots")
    return options.topology(nodes, ranks_per_node, slots, "", start.placement_L[0].num_experts)


def _facts(made: Migration, boundaries: int | None, expert_mb: float) -> dict[str, Any]:
    crossing = sum(made.node_R[m.source] != made.node_R[m.destination] for wave in made.wave_N for m in wave.move_N)
    per_layer = [0] * len(made.start.placement_L)
    for wave in made.wave_N:
        per_layer[wave.layer] += 1
    return {
        "moves": made.moves,
        "across_nodes": crossing,
        "megabytes": made.bytes / 1e6 if expert_mb else None,
        "waves_of_a_layer": max(per_layer),
        "boundaries": boundaries,
        "ranks": made.ranks,
    }
