"""A service keeps every request and answer while it is resized and loses a member; its report holds its tables."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch

from scripts.generate import Served
from scripts.serving.batch import Continuous
from scripts.serving.compare import recorded
from scripts.serving.front import Desk
from scripts.serving.member import Part
from scripts.serving.resize import KILLED, resize
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
