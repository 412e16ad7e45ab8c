"""A service that grows, shrinks and loses a member while requests run, and what that did to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scripts.serving.front import Front
from scripts.serving.member import Part, Stepped
from scripts.serving.requests import Request
from scripts.serving.weights import shape_of

KILLED = "one is killed"


@dataclass(frozen=True, kw_only=True)
class Event:
    """From when it was asked for until the service was at rest. unanswered: requests that were there all the while.
    again: requests that were asked of another member."""

    name: str
    members: int
    began: float
    ended: float
    unanswered: int
    again: int


@dataclass(frozen=True, kw_only=True)
class Resized:
    """lost, doubled, wrong: numbers of requests; none, where all is well."""

    events: tuple[Event, ...]
    steps: tuple[Stepped, ...]
    lost: tuple[int, ...]
    doubled: tuple[int, ...]
    wrong: tuple[int, ...]
    answered: int

    @property
    def median(self) -> float:
        return float(np.median([step.seconds for step in self.steps]))

    def worst(self, event: Event) -> float:
        """The longest step that had to do with it, by the median step."""
        touched = [s.seconds for s in self.steps if s.began < event.ended and s.began + s.seconds > event.began]
        return max(touched, default=0.0) / self.median


def resize(
    part: Part, requests: Iterable[Request], truth: dict[int, bytes], sizes: Sequence[int] = (2, 4, 3), *, limit: float
) -> Resized:
    """From the first of the sizes to the last, then one member is killed. truth: what one process answers. limit:
    seconds for all of it."""
    shape = shape_of(part.source)
    events: list[Event] = []
    with Front(part, sizes[0], shape.moe.num_experts, shape.layers) as front:
        deadline = time.monotonic() + limit
        front.start(max(sizes) - sizes[0])
        _until(front, lambda: front.known == max(sizes), deadline)
        front.desk.waiting.extend(requests)
        total = len(front.desk.waiting)

        def change(name: str, members: int, act: Callable[[], object]) -> None:
            share = total * (len(events) + 1) // (len(sizes) + 3)
            _until(front, lambda: len(front.desk.answers) >= share, deadline)
            began, again = time.monotonic(), len(front.desk.again)
            act()
            _until(front, lambda: front.rests_at(members), deadline)
            events.append(
                Event(
                    name=name,
                    members=members,
                    began=began,
                    ended=time.monotonic(),
                    unanswered=total - len(front.desk.answers),
                    again=len(front.desk.again) - again,
                )
            )

        for before, after in pairwise(sizes):
            change(f"{before} → {after}", after, lambda: front.scale(after))  # noqa: B023  # change calls it now
        change(KILLED, sizes[-1] - 1, lambda: front.kill(max(front.desk.asked)))
        _until(front, lambda: len(front.desk.answers) == total, deadline)
    answers = front.desk.answers
    return Resized(
        events=tuple(events),
        steps=tuple(front.steps),
        lost=tuple(sorted(truth.keys() - answers.keys())),
        doubled=tuple(front.desk.doubled),
        wrong=tuple(number for number, text in answers.items() if truth[number] != text),
        answered=len(answers),
    )


HEADS = (
    "event", "members after", "worst step ÷ median", "at rest after, in median steps", "requests asked again",
    "unanswered meanwhile",
)  # fmt: skip


def table_of_events(resized: Resized) -> list[list[object]]:
    return [
        [e.name, e.members, resized.worst(e), (e.ended - e.began) / resized.median, e.again, e.unanswered]
        for e in resized.events
    ]


def verdict(resized: Resized) -> str:
    return (
        f"{resized.answered} requests answered; lost {len(resized.lost)}, answered twice {len(resized.doubled)}, other "
        f"than one process answers {len(resized.wrong)}. The worst step of all is "
        f"{max(step.seconds for step in resized.steps) / resized.median:.1f} times the median one."
    )


def _until(front: Front, done: Callable[[], bool], deadline: float) -> None:
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not in time: {len(front.desk.answers)} answers; {front.status()}")
        front.pump(0.05)
