"""moe-place plan."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from placement import options
from placement.console import emit, errors_in_one_line, new_file, say, show, working
from placement.files import write_all
from placement.formats import sidecar
from placement.metrics import moves_L
from placement.plan import Plan
from placement.topology import Topology
from placement.trace import LoadTrace


def plan(
    context: typer.Context,
    trace: options.Traces,
    *,
    nodes: options.Nodes,
    ranks_per_node: options.RanksPerNode,
    slots: options.Slots,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the plan goes.")],
    planner: Annotated[str, typer.Option(help=f"One of {', '.join(options.PLANNERS)}.")] = "auto",
    balance_cap: Annotated[float, typer.Option(help="Largest peak/mean of a layer, for affinity and ilp.")] = math.inf,
    groups: Annotated[int, typer.Option(help="Expert groups that would rather stay on one node each.")] = 0,
    strict_groups: Annotated[bool, typer.Option("--strict-groups", help="They must.")] = False,
    group_price: Annotated[float, typer.Option(help="Peak/mean worth giving up for whole groups.")] = 0.1,
    tolerate: Annotated[
        int, typer.Option(help="packed: nodes (of one node: ranks) that may fail with no expert lost.")
    ] = 0,
    scenarios: Annotated[int, typer.Option(help="Loads judged apart: for robust (0: 8), affinity's cap (0: 1).")] = 0,
    tail: Annotated[float, typer.Option(help="robust: share of scenarios, worst first; 0 worst, 1 mean.")] = 0.25,
    fan_out: Annotated[float, typer.Option("--fan-out", help="affinity: weight of few ranks and nodes a token.")] = 0.0,
    node_worth: Annotated[float, typer.Option(help="affinity: a hop within the node, beside one on the rank.")] = 0.5,
    monolithic: Annotated[bool, typer.Option("--monolithic", help="ilp: all layers in one programme.")] = False,
    start: Annotated[Path | None, typer.Option("--from", help="Rebalance from this plan.")] = None,
    max_moves: Annotated[int, typer.Option(help="Experts that a layer may fetch, with --from.")] = -1,
    time_limit: Annotated[float, typer.Option(help="Seconds for all integer programmes together.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the searches; the same seed, the same plan.")] = 0,
    speed: options.Speed = "",
    memory_gb: options.Memory = "",
    expert_mb: options.ExpertMb = 0.0,
    window: options.Window = 0,
    experts: options.Experts = 0,
    as_json: options.Json = False,
) -> None:
    """Decide where experts live."""
    given = frozenset(_spelled(context))
    with errors_in_one_line():
        new_file(out, sidecar=True)
        if max_moves != -1 and start is None:
            raise ValueError("--max-moves needs --from, the plan that is running")
        wanted = options.Wanted(
            planner=planner,
            balance_cap=balance_cap,
            groups=groups,
            strict_groups=strict_groups,
            group_price=group_price,
            tolerate=tolerate,
            tail=tail,
            fan_out=fan_out,
            node_worth=node_worth,
            scenarios=scenarios,
            monolithic=monolithic,
            time_limit=time_limit,
            seed=seed,
            given=given,
        )
        loads = options.traces(trace, window, experts)
        topology = options.topology(nodes, ranks_per_node, slots, speed, loads.num_experts)
        topology = options.remembered(topology, memory_gb, expert_mb)
        facts = _run(loads, topology, wanted, start, max_moves, out)
    emit(facts) if as_json else _show_plan(facts, out)


def _spelled(context: typer.Context) -> Iterator[str]:
    """The options that stood on the command line."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            yield name.replace("_", "-")


def _run(
    loads: LoadTrace, topology: Topology, wanted: options.Wanted, start: Path | None, max_moves: int, out: Path
) -> dict[str, Any]:
    before: Plan | None = None
    if start is not None:
        chosen, before = options.rebalancer(start, max_moves, wanted)
    else:
        chosen = options.planner(wanted, loads)
    begun = time.perf_counter()
    with working("planning"):
        made = chosen(loads, topology)
    seconds = time.perf_counter() - begun
    write_all({out: made.to_json().encode(), Path(f"{out}.sidecar.json"): sidecar(made, "plan")})
    return _planned(made, before, seconds)


def _planned(plan: Plan, before: Plan | None, seconds: float) -> dict[str, Any]:
    moved_L = moves_L(before, plan).tolist() if before else [0] * len(plan.placement_L)
    layers = [
        {
            "layer": layer,
            "peak_over_mean": c.peak_over_mean,
            "bound": c.bound,
            "gap": c.gap,
            "status": c.status,
            "method": c.method,
            "local": c.local,
            "local_bound": c.local_bound,
            "moves": moved,
        }
        for layer, c, moved in zip(plan.layer_L, plan.certificate_L, moved_L, strict=True)
    ]
    return {
        "planner": plan.provenance["planner"],
        "layers": layers,
        "peak_over_mean": float(np.mean([layer["peak_over_mean"] for layer in layers])),
        "worst_layer": max(layer["peak_over_mean"] for layer in layers),
        "seconds": seconds,
        "duplicates": sum(int((p.expert_RS >= 0).sum()) - int(p.held_RE.sum()) for p in plan.placement_L),
        "moves": sum(moved_L),
        "fingerprint": plan.fingerprint,
        "provenance": dict(plan.provenance),
    }


def _show_plan(facts: dict[str, Any], out: Path) -> None:
    worst = sorted(facts["layers"], key=lambda layer: -layer["peak_over_mean"])[:8]
    rows = [[row["layer"], row["peak_over_mean"], row["bound"], row["status"], row["moves"]] for row in worst]
    columns: tuple[str, ...] = ("layer", "peak/mean", "bound", "status", "moves")
    made = facts["provenance"]
    if "local" in made:
        columns = (*columns, "local", "at most")
        hops = [["" if row[name] is None else row[name] for name in ("local", "local_bound")] for row in worst]
        rows = [row + hop for row, hop in zip(rows, hops, strict=True)]
    show(f"{facts['planner']}: the {len(rows)} busiest layers", columns, rows)
    say(
        f"peak/mean {facts['peak_over_mean']:.4f} over {len(facts['layers'])} layers (max {facts['worst_layer']:.4f}), "
        f"{facts['moves']} moves, {facts['seconds']:.2f} s; written to {out}"
    )
    if "local" in made:
        found = f"; {made['hops']}" if "hops" in made else ""
        say(f"hops that stay on a rank: {made['local']:.4f}, at most {made['local_bound']:.4f} could{found}")
    if not facts["moves"] and made["planner"] == "rebalance":
        say("nothing moves: no change within --max-moves would lower a layer's peak by enough to be worth it")
    if made.get("cap", "none") not in {"none", "kept"}:
        say(f"balance cap {made['cap']}")
