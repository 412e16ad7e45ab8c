"""A service keeps every request and answer while it is resized and loses a member; its report holds its tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe import World
from scripts.bench.live import plan_for
from scripts.generate import Served
from scripts.serving.batch import Continuous
from scripts.serving.compare import HEADS, Watched, recorded, require_equal_answers, table_of, watch, ways
from scripts.serving.front import Desk
from scripts.serving.member import Part, Stepped
from scripts.serving.page import page, picture_of_loads, picture_of_members, picture_of_time, table
from scripts.serving.resize import HEADS as EVENTS
from scripts.serving.resize import KILLED, Event, Resized, resize, table_of_events, verdict
from tests.scripts.serving import requests_of
from tests.scripts.test_generate import trained

SERVED = Served(schedule=Continuous(slots=3, tokens=9), clock="steps", dtype=torch.float64)


def test_growing_shrinking_and_a_killed_rank_lose_double_and_change_no_answer(tmp_path: Path) -> None:
    """The dead member's experts come from the checkpoint, its requests are asked again."""
    trained(tmp_path / "run")
    requests = requests_of(240)
    truth, _ = recorded(tmp_path / "run", requests, SERVED, 2)
    part = Part(address="", source=tmp_path / "run", schedule=SERVED.schedule)
    seen = resize(part, requests, truth, (2, 3, 2), limit=110.0)
    assert (seen.lost, seen.doubled, seen.wrong) == ((), (), ())
    assert seen.answered == len(requests)
    assert [(event.name, event.members) for event in seen.events] == [("2 → 3", 3), ("3 → 2", 2), (KILLED, 1)]
    assert seen.events[-1].again > 0
    assert max(step.tries for step in seen.steps) == 2


def test_every_way_gives_one_process_s_answers_and_only_those_that_replan_move_experts(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    trained(tmp_path / "run")
    requests = requests_of(24)
    truth, earlier = recorded(tmp_path / "run", requests, SERVED, 2)
    chosen = ways(SERVED, plan_for(earlier, 2), 20)
    runs = {name: [watch(world(2), tmp_path / "run", requests, way)] for name, way in chosen.items()}
    require_equal_answers(runs, truth)
    moves = {name: own[0].moves for name, own in runs.items()}
    assert moves["replanning without advice"] > 0
    assert (
        moves["nothing"]
        == moves["a static plan"]
        == moves["least-loaded rerouting"]
        == moves["rerouting where it pays"]
        == 0
    )
    assert moves["replanning without advice"] >= moves["replanning with advice"]
    assert runs["nothing"][0].peak == runs["nothing again"][0].peak
    runs["both"][0].answers[3] += b"!"
    with pytest.raises(RuntimeError, match=r"both: requests \[3\]"):
        require_equal_answers(runs, truth)


@pytest.mark.fast
def test_ratios_are_by_the_clock_of_the_busiest_rank_and_by_the_wall_s() -> None:
    slow = watched([1.0, 3.0, 2.0], [9.0, 9.0, 9.0], peak=2.0)
    fast = watched([1.0, 1.0, 1.0], [9.0, 9.0, 9.0], peak=1.0)
    assert slow.latency_N(0).tolist() == [4.0, 5.0]  # one came before the first step, one between it and the second
    nothing, other = table_of({"nothing": slow, "a static plan": fast})
    assert nothing == ["nothing", 2.0, 1.0, 1.0, 1.0, 1.0, 0]
    assert other[:3] == ["a static plan", 1.0, 2.0]
    assert other[4:] == [1.0, 1.0, 0]


@pytest.mark.fast
def test_the_report_is_one_file_that_holds_its_tables_and_pictures_and_needs_no_network() -> None:
    pytest.importorskip("matplotlib")
    run = watched([1.0, 3.0, 2.0], [9.0, 9.0, 9.0], peak=2.0)
    step = Stepped(member=1, epoch=1, began=5.0, seconds=0.1, rows=7, tries=1, said=())
    event = Event(name="2 → 4", members=4, began=5.0, ended=5.5, unanswered=3, again=0)
    seen = Resized(events=(event,), steps=(step, step), lost=(), doubled=(), wrong=(), answered=2)
    parts = [
        table("While topics drift", "a note", HEADS, table_of({"nothing": run})),
        picture_of_loads({"nothing": run}),
        picture_of_time({"nothing": run}),
        table("Ranks come & go", verdict(seen), EVENTS, table_of_events(seen)),
        picture_of_members(seen),
    ]
    text = page("The live loop", "of this machine", parts)
    assert text.count("src='data:image/png;base64,") == text.count("<img") == 3
    assert all(head in text for head in (*HEADS, *EVENTS))
    assert "Ranks come &amp; go" in text
    assert "<td>2 → 4</td><td>4</td><td>1.00</td>" in text
    assert "lost 0, answered twice 0" in text
    assert not any(word in text for word in ("http:", "https:", "<script"))


def watched(alone_S: list[float], shared_S: list[float], *, peak: float) -> Watched:
    lines = [{"step": n + 1, "rows": 4, "peak": peak, "moves": 0, "load_R": [3, 1]} for n in range(len(alone_S))]
    return Watched(
        tick_S=np.arange(1.0, len(alone_S) + 1),
        second_CS=np.array([alone_S, shared_S]),
        line_S=tuple(lines),
        answers={0: b"a", 1: b"bc"},
        span_N2=np.array([[0.5, 2.0], [1.5, 3.0]]),
    )


@pytest.mark.fast
def test_what_a_member_leaves_is_asked_of_others_in_its_old_order_and_answered_once() -> None:
    requests = requests_of(6)
    desk = Desk(deque(requests), depth=2)
    desk.enter(1)
    desk.enter(2)
    assert [(member, r.id) for member, r in desk.deal()] == [(1, 0), (2, 1), (1, 2), (2, 3)]
    desk.hear(1, 0, b"zero")
    desk.leave(1)
    assert [r.id for r in desk.waiting] == [2, 4, 5]
    desk.hear(2, 1, b"one")
    assert [(member, r.id) for member, r in desk.deal()] == [(2, 2)]
    desk.hear(2, 2, b"two")
    desk.hear(2, 2, b"again")
    assert (desk.answers[2], desk.doubled, desk.again) == (b"two", [2], [2])
