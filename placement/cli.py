"""moe-place: plan where experts live, check it, compare it, price it, and write it for an engine.

Exit codes: 0 done; 1 the answer is no (a certificate that does not hold); 2 what was given cannot be, said in one line.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from placement import cli_migrate, cli_plan, cli_time, options
from placement.certify import verify as verified
from placement.console import emit, errors_in_one_line, new_file, say, show, working
from placement.files import write_whole
from placement.formats import ENGINES, read_plan, read_trace, write_plan
from placement.metrics import fan_out, local_share, moves_L, peak_over_mean, peak_over_mean_L, rank_load_WLR
from placement.plan import Plan
from placement.rename import machine_of
from placement.report import report as reported
from placement.trace import LoadTrace

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(cli_plan.plan)


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
    topology = machine_of(plan)
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
            f"{len(verdicts)} layers, {faults} faults; {unproved} bounds rest on a solver or search: not proved again; "
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
        new_file(target, sidecar=to != "trace")
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
            page = reported(made, loads, machine_of(made), _scored(loads, made))
        write_whole(out, page.encode())
    emit({"written": [str(out)]}) if as_json else say(f"written: {out}")


for command in (cli_migrate.migrate, cli_time.simulate, cli_time.advise, cli_time.size, cli_time.calibrate):
    app.command()(command)


def main() -> None:
    app()
