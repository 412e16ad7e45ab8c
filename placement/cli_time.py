"""The commands of moe-place that speak of seconds: simulate, advise, size, calibrate."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from placement import options
from placement.advise import Option
from placement.advise import advise as advised
from placement.calibrate import calibrate as calibrated
from placement.console import emit, errors_in_one_line, new_file, say, show, working
from placement.files import write_whole
from placement.formats import read_trace
from placement.plan import Plan
from placement.rename import machine_of
from placement.simulate import ExpertShape
from placement.simulate import simulate as simulated
from placement.size import size as sized
from placement.topology import Topology


def advise(
    trace: options.TraceFile,
    *,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="The plan that is running.")] = None,
    nodes: options.Nodes = 1,
    ranks_per_node: options.RanksPerNode = 8,
    slots: Annotated[str, typer.Option(help="As for plan; just enough for one copy of each expert if empty.")] = "",
    steps: Annotated[int, typer.Option(help="Steps that a plan would serve.")] = 1000,
    dim: options.Dim = 2048,
    hidden: options.Hidden = 1408,
    curve: options.Curve = None,
    window: options.Window = 0,
    experts: options.Experts = 0,
    as_json: options.Json = False,
) -> None:
    """Stay, re-place, replicate or reroute: fitted on some windows, judged on the others."""
    with errors_in_one_line():
        loads, shape = options.traces([trace], window, experts), ExpertShape(dim=dim, hidden=hidden)
        running = Plan.load(plan_file) if plan_file else None
        if running is not None and not slots:
            topology = machine_of(running)
        else:
            topology = options.topology(nodes, ranks_per_node, slots or str(loads.num_experts), "", loads.num_experts)
        gemm = options.curve_of(curve, shape)
        with working("weighing the options"):
            advice = advised(loads, topology, running=running, curve=gemm, shape=shape, steps=steps)
    rows = [{k: v for k, v in vars(option).items() if k != "plan"} for option in advice.option_N]
    if as_json:
        windows = {"fit_windows": advice.fit_windows, "held_windows": advice.held_windows}
        emit({"choice": advice.choice, "reason": advice.reason, **windows, "curve": gemm.source, "options": rows})
    else:
        columns = ("option", "us a\nstep", "peak/mean", "moves", "ms to\nmove", "us\ngained", "pays off\n(tokens)")
        show("on held-out windows", columns, [_courses(option) for option in advice.option_N])
        say(f"{advice.choice}: {advice.reason}\nmatrices {gemm.source}; links modelled")


def _courses(option: Option) -> list[object]:
    gained, moved = 1e6 * option.gain, 1e3 * option.move_seconds
    step = (option.name, 1e6 * option.seconds, option.peak_over_mean)
    return [*step, option.moves, moved, gained, option.break_even_tokens]


def size(
    trace: options.TraceFile,
    *,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to try.")] = "8,16,32",
    spare: Annotated[str, typer.Option(help="Spare slots to try, all ranks together.")] = "0,32",
    ranks_per_node: options.RanksPerNode = 8,
    dim: options.Dim = 2048,
    hidden: options.Hidden = 1408,
    curve: options.Curve = None,
    as_json: options.Json = False,
) -> None:
    """The worst rank's memory and the step time, for several sizes."""
    with errors_in_one_line():
        shape = ExpertShape(dim=dim, hidden=hidden)
        counts, extras = ([int(v) for v in options.numbers(text, "sizes")] for text in (ranks, spare))
        machine = Topology.even(ranks=1, slots=1, ranks_per_node=ranks_per_node)
        with working("sizing"):
            gemm = options.curve_of(curve, shape)
            sizes = sized(read_trace(trace), machine, counts, extras, curve=gemm, shape=shape)
    if as_json:
        emit({"curve": gemm.source, "sizes": [asdict(each) for each in sizes]})
    else:
        rows = [list(asdict(each).values()) for each in sizes]
        show(f"matrices {gemm.source}; links modelled", tuple(asdict(sizes[0])), rows)


def simulate(
    trace: options.TraceFile,
    plan_file: options.PlanFile,
    *,
    dim: options.Dim = 2048,
    hidden: options.Hidden = 1408,
    curve: options.Curve = None,
    within: Annotated[float, typer.Option(help="GB/s of a rank's link within a node; 0 for the plan's.")] = 0.0,
    across: Annotated[float, typer.Option(help="GB/s of a rank's link across nodes; 0 for the plan's.")] = 0.0,
    window: options.Window = 0,
    experts: options.Experts = 0,
    as_json: options.Json = False,
) -> None:
    """Step time of a plan on a trace, window by window."""
    with errors_in_one_line():
        loads, made = options.traces([trace], window, experts), Plan.load(plan_file)
        shape = ExpertShape(dim=dim, hidden=hidden)
        topology = options.linked(machine_of(made), within, across)
        with working("simulating"):
            run = simulated(made, loads, topology, options.curve_of(curve, shape), shape)
    facts = {
        "seconds": float(run.step_W.mean()),
        "compute_seconds": float(run.compute_WL.sum(axis=1).mean()),
        "link_seconds": float(run.link_WL.sum(axis=1).mean()),
        "worst_window_seconds": float(run.step_W.max()),
        "windows": loads.windows,
    }
    if as_json:
        emit({**facts, "measured": run.measured, "modelled": run.modelled, "step_seconds": run.step_W.tolist()})
    else:
        show("a step", ("part", "value"), list(facts.items()))
        say(f"measured: {'; '.join(run.measured) or 'nothing'}\nmodelled: {'; '.join(run.modelled)}")


def calibrate(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the curve goes.")],
    dim: options.Dim = 2048,
    hidden: options.Hidden = 1408,
    rows: Annotated[str, typer.Option(help="Numbers of rows to time.")] = "16,64,256,1024,4096",
    as_json: options.Json = False,
) -> None:
    """Time the expert matrices on this machine."""
    with errors_in_one_line():
        new_file(out)
        with working("measuring") as progress:
            shape, counts = ExpertShape(dim=dim, hidden=hidden), [int(v) for v in options.numbers(rows, "--rows")]
            for task in progress.task_ids:
                progress.update(task, total=len(counts))

            def advance(_: int) -> None:
                for task in progress.task_ids:
                    progress.advance(task)

            measured = calibrated(shape, counts, done=advance)
        write_whole(out, (json.dumps(asdict(measured)) + "\n").encode())
    if as_json:
        emit(asdict(measured))
    else:
        show(measured.source, ("rows", "seconds"), list(zip(measured.rows, measured.seconds, strict=True)))
