"""The command line's words for topologies, planners and machines, turned into values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from placement.affinity import Affinity
from placement.formats import read_traces
from placement.formats.source import MOST_EXPERTS, json_values
from placement.greedy import Packed, Planner, RoundRobin
from placement.groups import PricedGroups, StrictGroups
from placement.ilp import Ilp, IlpWhole
from placement.merge import merge
from placement.plan import Plan
from placement.rebalance import Rebalance
from placement.robust import Robust
from placement.simulate import ExpertShape, GemmCurve
from placement.tolerant import Tolerant
from placement.topology import Link, Topology
from placement.trace import LoadTrace

PLANNERS = ("auto", "round-robin", "packed", "robust", "affinity", "ilp")

Traces = Annotated[list[Path], typer.Argument(help="Recordings: ours, SGLang, vLLM, TensorRT-LLM, Megatron, ...")]
TraceFile = Annotated[Path, typer.Argument(help="A recording.")]
PlanFile = Annotated[Path, typer.Argument(help="A plan of moe-place.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON instead of tables.")]
Nodes = Annotated[int, typer.Option(help="Nodes.")]
RanksPerNode = Annotated[int, typer.Option(help="Ranks (GPUs) of a node.")]
Slots = Annotated[
    str,
    typer.Option(
        help="Expert slots of each rank; or of all ranks together, where that is as many as there are experts or more "
        "(a rank has no use for so many); or a list, one for each rank: 5,5,4,4."
    ),
]
Window = Annotated[int, typer.Option(help="Cut the trace into windows of so many tokens; 0 keeps its own.")]
Experts = Annotated[int, typer.Option(help="Experts of a layer, if the last were never chosen; 0 believes the trace.")]
Speed = Annotated[str, typer.Option(help="Relative speed of each rank, such as 1,1,0.5,1.")]
Memory = Annotated[str, typer.Option(help="GB that each rank has for the experts of one layer: one number or a list.")]
ExpertMb = Annotated[float, typer.Option(help="MB of an expert of one layer, with --memory-gb.")]
Curve = Annotated[Path | None, typer.Option(help="A curve that `moe-place calibrate` wrote; modelled without one.")]
Dim = Annotated[int, typer.Option(help="Model width.")]
Hidden = Annotated[int, typer.Option(help="An expert's hidden width.")]


def traces(paths: Sequence[Path], window: int, experts: int) -> LoadTrace:
    read = read_traces(paths)
    most = max([experts, *(trace.num_experts for trace in read)])
    if experts and most > experts:
        raise ValueError(f"the trace has {most} experts, more than --experts {experts}")
    # Choices show an expert only once it is chosen; tables of loads have a place for each, and must agree.
    trace = merge([trace if trace.expert_TLK is None and not experts else trace.widened(most) for trace in read])
    return trace.windowed(window) if window else trace


def topology(nodes: int, ranks_per_node: int, slots: str, speed: str, num_experts: int) -> Topology:
    if nodes < 1 or ranks_per_node < 1:
        raise ValueError(f"--nodes and --ranks-per-node must be at least 1; got {nodes} and {ranks_per_node}")
    ranks = nodes * ranks_per_node
    if ranks > MOST_EXPERTS:
        raise ValueError(f"--nodes and --ranks-per-node make {ranks} ranks; expected at most {MOST_EXPERTS}")
    speed_R = tuple(numbers(speed, "--speed", ranks)) if speed else ()
    each = [int(value) for value in numbers(slots, "--slots")]
    if any(not 0 <= value <= MOST_EXPERTS for value in each):
        raise ValueError(f"--slots must be from 0 to {MOST_EXPERTS}; got {slots}")
    if len(each) == 1 and each[0] >= num_experts:
        spare = each[0] - num_experts
        fitted = Topology.fitting(num_experts=num_experts, ranks=ranks, ranks_per_node=ranks_per_node, spare=spare)
        return replace(fitted, speed_R=speed_R)
    if len(each) == 1:
        each *= ranks
    if len(each) != ranks:
        raise ValueError(f"--slots lists {len(each)} ranks; there are {ranks}")
    return Topology(slots_R=tuple(each), ranks_per_node=ranks_per_node, speed_R=speed_R)


def remembered(machine: Topology, memory_gb: str, expert_mb: float) -> Topology:
    """The same machine with the memory that its ranks were said to have."""
    if not memory_gb:
        if expert_mb:
            raise ValueError("--expert-mb needs --memory-gb, the memory of each rank")
        return machine
    if expert_mb <= 0:
        raise ValueError("--memory-gb needs --expert-mb, the size of an expert")
    listed = numbers(memory_gb, "--memory-gb")
    memory = listed * machine.ranks if len(listed) == 1 else listed
    memory_R = tuple(int(gigabytes * 1e9) for gigabytes in memory)
    return replace(machine, memory_R=memory_R, expert_bytes=round(expert_mb * 1e6))


def numbers(text: str, option: str, count: int = 0) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between; got {text!r}") from None
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{option} must be finite numbers; got {text!r}")
    if count and len(values) != count:
        raise ValueError(f"{option} needs {count} numbers, one for each rank; got {len(values)}")
    if option not in {"--speed", "--memory-gb"} and any(value % 1 for value in values):
        raise ValueError(f"{option} must be whole numbers; got {text!r}")
    return values


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the plan command was told of its planner. given: the options that stood on the command line."""

    planner: str
    balance_cap: float
    groups: int
    strict_groups: bool
    group_price: float
    tolerate: int
    tail: float
    fan_out: float
    node_worth: float
    scenarios: int
    monolithic: bool
    time_limit: float
    seed: int
    given: frozenset[str]

    def named(self, trace: LoadTrace) -> str:
        """auto: affinity under a cap where hops are known, else robust for several windows, else packed."""
        if self.planner not in PLANNERS:
            raise ValueError(f"--planner {self.planner!r} is not one of {', '.join(PLANNERS)}")
        if self.planner != "auto":
            return self.planner
        if self.balance_cap < math.inf and trace.follow_LEE is not None:
            return "affinity"
        return "robust" if trace.windows > 1 and not self.groups and not self.tolerate else "packed"

    def refuse_ignored(self, name: str) -> None:
        """An option that this planner would pass over in silence."""
        if self.balance_cap < math.inf and name not in {"affinity", "ilp"}:
            raise ValueError(f"--balance-cap is for affinity and ilp; {name} makes the peak as low as it can")
        for option, planners in FOR.items():
            if option in self.given and name not in planners:
                raise ValueError(f"--{option} is for {' and '.join(planners)}; got --planner {name}")
        for option in ("strict-groups", "group-price"):
            if option in self.given and not self.groups:
                raise ValueError(f"--{option} needs --groups")
        if self.groups and self.tolerate:
            raise ValueError("--groups keeps an expert on one node, --tolerate 1 on two; give one of them")


# The planners that listen to an option.
FOR = {
    "groups": ("packed",),
    "tolerate": ("packed",),
    "tail": ("robust",),
    "scenarios": ("robust", "affinity"),
    "fan-out": ("affinity",),
    "node-worth": ("affinity",),
    "monolithic": ("ilp",),
}
ANEW = ("planner", "balance-cap", "strict-groups", "group-price", "time-limit", *FOR)


def planner(wanted: Wanted, trace: LoadTrace) -> Planner:
    name, seed = wanted.named(trace), wanted.seed
    wanted.refuse_ignored(name)
    packed = Packed(seed=seed)
    if wanted.tolerate:
        return Tolerant(failures=wanted.tolerate, packed=packed)
    if wanted.groups:
        strict = StrictGroups(groups=wanted.groups, packed=packed)
        priced = PricedGroups(groups=wanted.groups, price=wanted.group_price, packed=packed)
        return strict if wanted.strict_groups else priced
    if name == "robust":
        return Robust(tail=wanted.tail, most_scenarios=wanted.scenarios or Robust.most_scenarios, seed=seed)
    if name == "affinity":
        return Affinity(
            balance_cap=wanted.balance_cap,
            most_scenarios=wanted.scenarios or Affinity.most_scenarios,
            node_worth=wanted.node_worth,
            fan_out=wanted.fan_out,
            seed=seed,
        )
    if name == "ilp":
        programme = IlpWhole if wanted.monolithic else Ilp
        return programme(seconds=wanted.time_limit, balance_cap=wanted.balance_cap, seed=seed)
    return RoundRobin() if name == "round-robin" else packed


def rebalancer(start: Path, most_moves: int, wanted: Wanted) -> tuple[Planner, Plan]:
    for option in ANEW:
        if option in wanted.given:
            raise ValueError(
                f"--{option} plans anew; leave it out with --from, which improves the plan that is running"
            )
    if most_moves < 0:
        raise ValueError("--from needs --max-moves, the experts that a layer may fetch")
    plan = Plan.load(start)
    return Rebalance(start=plan, most_moves=most_moves, seed=wanted.seed), plan


def linked(machine: Topology, within: float, across: float) -> Topology:
    """GB/s of the links; 0 keeps what the topology says."""
    fast = Link(latency=machine.within_node.latency, bandwidth=within * 1e9) if within else machine.within_node
    slow = Link(latency=machine.across_nodes.latency, bandwidth=across * 1e9) if across else machine.across_nodes
    return replace(machine, within_node=fast, across_nodes=slow)


def curve_of(path: Path | None, shape: ExpertShape) -> GemmCurve:
    if path is None:
        return GemmCurve.modelled(shape)
    try:
        curve = GemmCurve.read(json_values(path.read_bytes(), "JSON"))
        curve.require(shape)
        return curve
    except KeyError as error:
        raise ValueError(f"{path}: field {error} is missing; expected what `moe-place calibrate` writes") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a curve for this: {error}") from None
