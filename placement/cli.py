"""moe-place: plan where experts live, check it, compare it, price it, and write it for an engine.

Exit codes: 0 done; 1 the answer is no (a certificate that does not hold); 2 what was given cannot be, said in one line.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from placement import cli_time, options
from placement.certify import verify as verified
from placement.console import emit, errors_in_one_line, new_file, say, show, working
from placement.files import write_whole
from placement.formats import ENGINES, read_plan, read_trace, sidecar, write_plan
from placement.metrics import fan_out, local_share, moves_L, peak_over_mean, peak_over_mean_L, rank_load_WLR
from placement.plan import Plan
from placement.report import report as reported
from placement.trace import LoadTrace

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def plan(
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
    tail: Annotated[float, typer.Option(help="robust: share of scenarios, worst first; 0 worst, 1 mean.")] = 0.25,
    fan_out_weight: Annotated[float, typer.Option("--fan-out", help="affinity: weight of few ranks a token.")] = 0.0,
    whole: Annotated[bool, typer.Option("--monolithic", help="ilp: all layers in one programme.")] = False,
    start: Annotated[Path | None, typer.Option("--from", help="Rebalance from this plan.")] = None,
    max_moves: Annotated[int, typer.Option(help="Experts that a layer may fetch, with --from.")] = -1,
    time_limit: Annotated[float, typer.Option(help="Seconds for all integer programmes together.")] = 60.0,
    seed: int = 0,
    speed: options.Speed = "",
    memory_gb: options.Memory = "",
    expert_mb: options.ExpertMb = 0.0,
    window: options.Window = 0,
    experts: options.Experts = 0,
    as_json: options.Json = False,
) -> None:
    """Decide where experts live."""
    with errors_in_one_line():
        new_file(out)
        loads = options.traces(trace, window, experts)
        topology = options.topology(nodes, ranks_per_node, slots, speed, loads.num_experts)
        topology = options.remembered(topology, memory_gb, expert_mb)
        before: Plan | None = None
        if start is not None:
            chosen, before = options.rebalancer(start, max_moves, seed)
        else:
            chosen = options.planner(
                planner,
                loads,
                cap=balance_cap,
                groups=groups,
                strict=strict_groups,
                price=group_price,
                tail=tail,
                fan_out=fan_out_weight,
                whole=whole,
                seconds=time_limit,
                seed=seed,
            )
        begun = time.perf_counter()
        with working("planning"):
            made = chosen(loads, topology)
        seconds = time.perf_counter() - begun
        write_whole(out, made.to_json().encode())
        write_whole(Path(f"{out}.sidecar.json"), sidecar(made, "plan"))
        facts = _planned(made, before, seconds)
        emit(facts) if as_json else _show_plan(facts, out)


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
    show(
        f"{facts['planner']}: the {len(rows)} busiest layers", ("layer", "peak/mean", "bound", "status", "moves"), rows
    )
    say(
        f"peak/mean {facts['peak_over_mean']:.4f} over {len(facts['layers'])} layers (max {facts['worst_layer']:.4f}), "
        f"{facts['moves']} moves, {facts['seconds']:.2f} s; written to {out}"
    )
    if facts["provenance"].get("cap", "none") not in {"none", "kept"}:
        say(f"balance cap {facts['provenance']['cap']}")


@app.command()
def score(
    trace: options.TraceFile,
    plan_file: options.PlanFile,
    *,
    window: options.Window = 0,
    experts: options.Experts = 0,
    as_json: options.Json = False,
) -> None:
    """Judge a plan on a trace: balance, hops, fan-out."""
    with errors_in_one_line():
        facts = _scored(options.traces([trace], window, experts), Plan.load(plan_file))
        if as_json:
            emit(facts)
        else:
            show("score", ("measure", "value"), [[name, "unknown" if v is None else v] for name, v in facts.items()])


def _scored(trace: LoadTrace, plan: Plan) -> dict[str, Any]:
    """On the load of all windows together; the windows' own peaks beside it. None where the trace cannot tell."""
    topology = options.machine_of(plan)
    peak_L = peak_over_mean_L(plan, trace.load_LE, topology)
    peak_WL = peak_over_mean(rank_load_WLR(plan, trace.load_WLE), topology.speed_R)
    pairs, tokens = trace.follow_LEE, trace.expert_TLK
    hops = pairs is not None and len(pairs) > 0
    return {
        "peak_over_mean": float(peak_L.mean()),
        "worst_layer": float(peak_L.max()),
        "worst_layer_number": plan.layer_L[int(peak_L.argmax())],
        "window_peak_over_mean": float(peak_WL.mean()),
        "worst_window": float(peak_WL.mean(axis=1).max()),
        "windows": trace.windows,
        "local_hops": local_share(plan, pairs, range(plan.ranks)) if pairs is not None and hops else None,
        "local_hops_node": local_share(plan, pairs, topology.node_R) if pairs is not None and hops else None,
        "fan_out_ranks": None if tokens is None else fan_out(plan, tokens, range(plan.ranks)),
        "fan_out_nodes": None if tokens is None else fan_out(plan, tokens, topology.node_R),
    }


@app.command()
def verify(
    plan_file: options.PlanFile,
    *,
    trace: Annotated[list[Path], typer.Option(help="The trace it was made from; again for each one.")],
    window: options.Window = 0,
    experts: options.Experts = 0,
    as_json: options.Json = False,
) -> None:
    """Recompute every certificate without a solver. Exit 1 where one does not hold."""
    with errors_in_one_line():
        loads, made = options.traces(trace, window, experts), Plan.load(plan_file)
        verdicts = verified(made, loads)
        same = made.provenance.get("trace") == loads.fingerprint
    faults = sum(len(verdict.faults) for verdict in verdicts)
    if as_json:
        emit({"holds": not faults, "same_trace": same, "layers": [asdict(verdict) for verdict in verdicts]})
    else:
        for verdict in verdicts:
            for fault in verdict.faults:
                say(f"layer {verdict.layer}: {fault}")
        unproved = sum(verdict.unproved for verdict in verdicts)
        say(
            f"{len(verdicts)} layers, {faults} faults; {unproved} bounds rest on a solver: checked, not proved again; "
            f"the trace is {'the one' if same else 'not the one'} that the plan was made from"
        )
    raise typer.Exit(1 if faults else 0)


@app.command()
def diff(plan_file: options.PlanFile, other: options.PlanFile, as_json: options.Json = False) -> None:
    """What going from one plan to another would fetch."""
    with errors_in_one_line():
        one, two = Plan.load(plan_file), Plan.load(other)
        moved = moves_L(one, two).tolist()
    facts = {"moves": sum(moved), "layers": [{"layer": n, "moves": m} for n, m in zip(one.layer_L, moved, strict=True)]}
    if as_json:
        emit(facts)
    else:
        show("moves", ("layer", "experts fetched"), [[n, m] for n, m in zip(one.layer_L, moved, strict=True) if m])
        say(f"{sum(moved)} experts fetched in all")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A plan of ours or of an engine, or a recording.")],
    target: Annotated[Path, typer.Argument(help="Where it goes.")],
    *,
    to: Annotated[str, typer.Option(help=f"trace (ours), or one of {', '.join(ENGINES)}.")],
    ranks: Annotated[int, typer.Option(help="Ranks, where the source does not say.")] = 0,
    layers: Annotated[int, typer.Option(help="Layers of the model, dense ones too, for sglang.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Rewrite a plan for an engine, with a sidecar of what it proves; or a recording as a trace of ours."""
    with errors_in_one_line():
        new_file(target)
        written = [str(target)]
        if to == "trace":
            read_trace(source).save(target)
        else:
            written.append(str(write_plan(read_plan(source, ranks), target, to, layers_in_model=layers)))
    emit({"written": written}) if as_json else say(f"written: {', '.join(written)}")


@app.command()
def report(
    trace: options.TraceFile,
    plan_file: options.PlanFile,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML page.")],
    window: options.Window = 0,
    experts: options.Experts = 0,
    as_json: options.Json = False,
) -> None:
    """One HTML page with pictures: load before and after, ranks, hops."""
    with errors_in_one_line():
        new_file(out)
        loads, made = options.traces([trace], window, experts), Plan.load(plan_file)
        with working("drawing"):
            page = reported(made, loads, options.machine_of(made), _scored(loads, made))
        write_whole(out, page.encode())
    emit({"written": [str(out)]}) if as_json else say(f"written: {out}")


for command in (cli_time.simulate, cli_time.advise, cli_time.size, cli_time.calibrate):
    app.command()(command)


def main() -> None:
    app()
