"""Ways to keep ranks even while requests run: each serves the same stream, step for step, and is watched.

Requests arrive by the step, so every way takes the same steps with the same tokens and gives the same answers; what
differs is how long a step takes. It is told by two clocks. `alone`: a step takes the processor time of its busiest
rank, as if each rank had a processor to itself. `shared`: a step takes what the clock on the wall of this machine says.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe import Recorder, World
from moe.comm import Peers, world_group
from placement import Advice, LoadTrace, Plan, advise
from routing import BreakEven, LeastLoaded
from scripts.generate import Between, Served
from scripts.serving.engine import Answer, Engine, Ordinary, share_of
from scripts.serving.loop import Steps, serve
from scripts.serving.requests import Request
from scripts.serving.weights import load_model

FloatArray = NDArray[np.float64]
NOTHING, AGAIN, WINDOW = "nothing", "nothing again", 10
REROUTING = "least-loaded rerouting"
WORTH = BreakEven.of(flops=4e10, bandwidth=1e9, bytes_per_weight=8)  # about one core and loopback, in float64
CLOCKS = ("alone", "shared")


class Part(NamedTuple):
    """What one rank saw. moments: after each step, what the requests' clock, the wall's and the processor's said; the
    first is from before."""

    moments: list[tuple[float, float, float]]
    line_S: list[dict[str, Any]]
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One run of one way. tick_S: the requests' clock at the end of each step. second_CS: how long it took, by each of
    CLOCKS. span_N2: when each request arrived and was answered, in ticks."""

    tick_S: FloatArray
    second_CS: FloatArray
    line_S: tuple[dict[str, Any], ...]
    answers: dict[int, bytes]
    span_N2: FloatArray

    @property
    def peak(self) -> float:
        return float(np.mean([line["peak"] for line in self.line_S]))

    @property
    def moves(self) -> int:
        return sum(line["moves"] for line in self.line_S)

    @property
    def load_SR(self) -> FloatArray:
        return np.array([line["load_R"] for line in self.line_S], dtype=np.float64)

    def throughput(self, clock: int) -> float:
        """Bytes of answers a second."""
        return sum(map(len, self.answers.values())) / float(self.second_CS[clock].sum())

    def latency_N(self, clock: int) -> FloatArray:
        """Seconds from a request's arrival to the last byte of its answer."""
        end_S = np.concatenate([[0.0], self.second_CS[clock].cumsum()])
        begun_N2 = end_S[np.searchsorted(self.tick_S, self.span_N2, side="right")]
        latency_N: FloatArray = begun_N2[:, 1] - begun_N2[:, 0]
        return latency_N


@dataclass(frozen=True, kw_only=True)
class Unquestioned(Advice):
    """Advice that is taken whatever it says."""

    def without(self, name: str) -> Unquestioned:
        return self


def unquestioned(*arguments: Any, **named: Any) -> Unquestioned:
    """As `placement.advise`, but the new plan is taken, whether or not it pays."""
    fields = vars(advise(*arguments, **named)) | {"choice": "re-place", "reason": "nobody asked whether it pays"}
    return Unquestioned(**fields)


def ways(base: Served, plan: Plan, replan_every: int) -> dict[str, Served]:
    """base: what all have in common. plan: of earlier requests."""
    replanned = replace(base, replan_every=replan_every)
    return {
        NOTHING: base,
        "a static plan": replace(base, plan=plan),
        "replanning without advice": replace(replanned, judge=unquestioned),
        "replanning with advice": replanned,
        REROUTING: replace(base, assigner=LeastLoaded()),
        "rerouting where it pays": replace(base, assigner=LeastLoaded(worth=WORTH)),
        "both": replace(replanned, assigner=LeastLoaded()),
        AGAIN: base,
    }


def watch(world: World, source: Path, requests: Sequence[Request], served: Served) -> Watched:
    """Served by all ranks of the world."""
    parts: list[Part] = world.run(watch_rank, source, requests, served)
    moment_RS3 = np.array([part.moments for part in parts])
    second_RS2 = np.diff(moment_RS3[:, :, 1:], axis=1)
    wall_S, busiest_S = second_RS2.max(axis=0).T
    answers = [answer for part in parts for answer in part.answers]
    if sorted(answer.request.id for answer in answers) != sorted(request.id for request in requests):
        raise RuntimeError(f"{len(requests)} requests came and {len(answers)} answers; each must have one")
    return Watched(
        tick_S=moment_RS3[0, 1:, 0],
        second_CS=np.stack([busiest_S, wall_S]),
        line_S=tuple(parts[0].line_S),
        answers={answer.request.id: answer.text for answer in answers},
        span_N2=np.array([(answer.request.arrival, answer.last) for answer in answers]),
    )


def watch_rank(source: Path, requests: Sequence[Request], served: Served) -> Part:
    """On every rank alike."""
    peers = Peers.of(world_group())
    model = load_model(source, world_group(), served.plan, assigner=served.assigner, dtype=served.dtype)
    engine = Engine(Ordinary(model, served.schedule), served.schedule, model.shape.length)
    between, clock, answers = Between(model, served, None), Steps(), list[Answer]()
    moments = [(0.0, time.perf_counter(), time.process_time())]

    def after(step: int) -> None:
        between(step)
        moments.append((clock.now, time.perf_counter(), time.process_time()))

    serve(engine, share_of(requests, peers), clock, peers, deliver=answers.append, between=after)
    return Part(moments, between.lines, answers)


def recorded(
    source: Path, requests: Iterable[Request], served: Served, ranks: int
) -> tuple[dict[int, bytes], LoadTrace]:
    """One process serves as many at a time as all ranks would. -> its answers; a LoadTrace of what experts had to do"""
    model = load_model(source, dtype=served.dtype)
    schedule = replace(served.schedule, slots=ranks * served.schedule.slots, tokens=ranks * served.schedule.tokens)
    engine, answers = Engine(Ordinary(model, schedule), schedule, model.shape.length), list[Answer]()
    with Recorder(model) as recorder:
        end_window = partial(_end_window, recorder)
        serve(engine, requests, Steps(), Peers.of(None), deliver=answers.append, between=end_window)
        recorder.end_window()
    return {answer.request.id: answer.text for answer in answers}, recorder.trace()


def _end_window(recorder: Recorder, step: int) -> None:
    if step % WINDOW == 0:
        recorder.end_window()


HEADS = (
    "way", "peak/mean of ranks", "throughput ÷ nothing", "p99 latency ÷ nothing", "throughput, shared cores",
    "p99 latency, shared cores", "experts moved",
)  # fmt: skip


def pooled(own: Sequence[Watched]) -> Watched:
    """The same steps, round after round: each takes the least of its times, so that a busy machine counts for less."""
    return replace(own[0], second_CS=np.min([run.second_CS for run in own], axis=0))


def table_of(runs: Mapping[str, Watched]) -> list[list[object]]:
    """runs: of each way, pooled. Ratios are to nothing."""
    rows: list[list[object]] = []
    base = runs[NOTHING]
    for name, own in runs.items():
        ratios = [own.peak]
        for clock in range(len(CLOCKS)):
            ratios += [own.throughput(clock) / base.throughput(clock), _p99(own, clock) / _p99(base, clock)]
        rows.append([name, *ratios, own.moves])
    return rows


def _p99(run: Watched, clock: int) -> float:
    return float(np.percentile(run.latency_N(clock), 99))


def require_equal_answers(runs: dict[str, list[Watched]], truth: dict[int, bytes]) -> None:
    """Raises where a way answered another thing than one process."""
    for name, own in runs.items():
        for run in own:
            if wrong := [number for number, text in truth.items() if run.answers[number] != text]:
                raise RuntimeError(f"{name}: requests {wrong} have other answers than one process gives")
