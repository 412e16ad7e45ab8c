"""Streams, batches and the engine: values in, values out, on one process."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.comm import Peers
from scripts.serving.batch import Continuous, Running
from scripts.serving.engine import Answer, Engine, Ordinary
from scripts.serving.loop import Steps, serve
from scripts.serving.report import line_of, summary
from scripts.serving.requests import Bursty, Drift, Poisson, Request, stream
from tests.scripts.serving import SHAPE, book, model_of, requests_of

pytestmark = pytest.mark.fast
ALONE = Peers.of(None)
TEXTS = {"a": torch.zeros(100, dtype=torch.int64), "b": torch.ones(100, dtype=torch.int64)}


def engine_of(schedule: Continuous = Continuous(slots=3, tokens=16)) -> Engine:
    return Engine(Ordinary(model_of(), schedule), schedule, SHAPE.length)


def served(engine: Engine, requests: tuple[Request, ...]) -> list[Answer]:
    answers: list[Answer] = []
    serve(engine, requests, Steps(), ALONE, deliver=answers.append)
    return answers


@pytest.mark.parametrize("arrivals", [Poisson(rate=2.0), Bursty(rate=2.0, burst=6.0)], ids=lambda a: type(a).__name__)
def test_a_stream_is_the_same_again_and_keeps_its_rate(arrivals: Poisson | Bursty) -> None:
    requests = stream(TEXTS, 4000, arrivals, seed=1)
    assert requests == stream(TEXTS, 4000, arrivals, seed=1) != stream(TEXTS, 4000, arrivals, seed=2)
    arrival_N = np.array([request.arrival for request in requests])
    assert (np.diff(arrival_N) >= 0).all()
    assert [request.id for request in requests] == list(range(4000))
    assert 4000 / arrival_N[-1] == pytest.approx(2.0, rel=0.15)
    together = 4000 / len(np.unique(arrival_N))
    assert together == pytest.approx(getattr(arrivals, "burst", 1.0), rel=0.15)


def test_topics_take_turns_at_being_hot() -> None:
    topics = [request.topic for request in stream(TEXTS, 400, Poisson(rate=1.0), Drift(period=100, hot=0.8))]
    for start, hot in ((0, "a"), (100, "b"), (200, "a"), (300, "b")):
        assert Counter(topics[start : start + 100])[hot] == pytest.approx(90, abs=10)


@given(
    slots=st.integers(1, 5),
    extra=st.integers(0, 20),
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), max_size=12),
)
def test_every_request_gets_on_in_turn_and_no_step_is_too_long(
    slots: int, extra: int, lengths: list[tuple[int, int]]
) -> None:
    schedule = Continuous(slots=slots, tokens=slots + extra)
    waiting = tuple(
        Request(id=n, arrival=0.0, prompt=b"x" * prompt, new_tokens=more) for n, (prompt, more) in enumerate(lengths)
    )
    running: tuple[Running, ...] = ()
    begun: list[int] = []
    ended: list[int] = []
    for _ in range(sum(prompt + more for prompt, more in lengths)):
        turn = schedule(running, waiting)
        assert turn.tokens <= slots + extra
        assert turn.tokens > 0 or not turn.running, "a step that takes nobody on"
        assert len({each.slot for each in turn.running}) == len(turn.running) <= slots
        assert len(turn.running) == slots or not turn.waiting, "a slot is free and somebody waits"
        for each, take in zip(turn.running, turn.take_B, strict=True):
            assert take == 1 if each.left == 1 else take <= each.left, "who answers is never held up"
        begun += [each.request.id for each in turn.running if each.request.id not in begun]
        moved = [each.advanced(take, 0, 1.0) for each, take in zip(turn.running, turn.take_B, strict=True)]
        ended += [each.request.id for each in moved if len(each.answer) == each.request.new_tokens]
        running = tuple(each for each in moved if len(each.answer) < each.request.new_tokens)
        waiting = turn.waiting
    assert begun == sorted(begun)
    assert sorted(ended) == list(range(len(lengths)))


@pytest.mark.parametrize("schedule", [Continuous(slots=1, tokens=1), Continuous(slots=3, tokens=4), Continuous()])
def test_answers_are_those_of_the_whole_sequence_read_anew_for_every_byte(schedule: Continuous) -> None:
    answers = served(engine_of(schedule), requests_of())
    assert {answer.request.id: answer.text for answer in answers} == book()
    assert len(set(book().values())) > 10, "the requests do not tell the answers apart"


def test_a_step_that_was_proposed_and_given_up_leaves_no_trace() -> None:
    engine, answers, now = engine_of(), [], 0.0
    engine.submit(requests_of())
    while not engine.idle:
        before = (engine.running, engine.waiting)
        first = engine.propose()
        assert (engine.running, engine.waiting) == before
        assert engine.propose() == first
        now += 1.0
        answers += engine.commit(first, now)
    assert {answer.request.id: answer.text for answer in answers} == book()


def test_requests_that_an_engine_gave_back_are_answered_by_another() -> None:
    engine, other, answers = engine_of(), engine_of(), []
    engine.submit(requests_of())
    for step in range(9):
        answers += engine.commit(engine.propose(), float(step))
    assert answers
    assert engine.running
    assert engine.waiting
    other.submit(engine.release())
    assert engine.idle
    answers += served(other, ())
    assert {answer.request.id: answer.text for answer in answers} == book()
    assert len(answers) == len(book())


def test_latencies_count_from_the_arrival_and_each_step_is_a_tick() -> None:
    request = Request(id=0, arrival=2.5, prompt=b"abcdefgh", new_tokens=4)
    (answer,) = served(engine_of(Continuous(slots=1, tokens=4)), (request,))
    # nothing to do at 0, 1 and 2; two steps from 3 read the prompt, three more say what is left
    assert (answer.first, answer.last) == (5.0, 8.0)
    assert (answer.wait, answer.pace) == (2.5, 1.0)


def test_a_request_lost_or_doubled_is_an_error_and_not_a_number() -> None:
    lines = [line_of(answer, 0) for answer in served(engine_of(), requests_of(4))]
    result = summary(lines, expected=4, steps=9, seconds=2.0)
    assert result["tokens_per_second"] == sum(len(line["answer"]) for line in lines) / 2.0
    assert result["time_to_first_token"]["p50"] == pytest.approx(
        np.median([line["time_to_first_token"] for line in lines])
    )
    with pytest.raises(RuntimeError, match=r"lost: \[2\], answered more than once: \[1\]"):
        summary(
            [lines[i] for i in np.argsort([line["id"] for line in lines])[[0, 1, 1, 3]]],
            expected=4,
            steps=9,
            seconds=2.0,
        )


def test_what_cannot_be_served_is_refused_before_it_is_begun() -> None:
    engine, request = engine_of(), requests_of()[0]
    with pytest.raises(ValueError, match=r"request 0 needs 33 places; the model has 32"):
        engine.submit([replace(request, prompt=b"x" * 30, new_tokens=4)])
    engine.submit([replace(request, prompt=b"x" * 30, new_tokens=3)])
    for wrong in (lambda: replace(request, prompt=b""), lambda: replace(request, new_tokens=0)):
        with pytest.raises(ValueError, match="both must be at least 1"):
            wrong()
    with pytest.raises(ValueError, match="a token for each"):
        Continuous(slots=4, tokens=3)
    with pytest.raises(ValueError, match="above 0"):
        Poisson(rate=0.0)
    with pytest.raises(ValueError, match="at least 1 request on average"):
        Bursty(rate=1.0, burst=0.5)
    with pytest.raises(ValueError, match="hot within"):
        Drift(hot=2.0)
