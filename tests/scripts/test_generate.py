"""Generation over many ranks answers what one process answers, while experts move, and from any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from moe import World, move_experts
from moe.comm import Peers, gather_objects, world_group
from placement import Placement, Plan
from scripts.generate import Served, generate
from scripts.serving.batch import Continuous
from scripts.serving.coherent import Coherent
from scripts.serving.engine import Answer, Engine, Ordinary, share_of
from scripts.serving.loop import Steps, serve
from scripts.serving.requests import Bursty
from scripts.train import Run, Trainer, small, train
from tests.scripts.serving import SHAPE, book, model_of, pages, requests_of

Worlds = Callable[[int], World]


def anywhere(ranks: int, seed: int) -> Plan:
    """Experts at random, ranks without any among them."""
    random = np.random.default_rng(seed)
    placement_L = []
    for _ in range(SHAPE.layers):
        home_E = random.integers(ranks, size=SHAPE.moe.num_experts)
        slots = int(np.bincount(home_E, minlength=ranks).max())
        expert_RS = np.full((ranks, slots), -1)
        for rank in range(ranks):
            mine = np.flatnonzero(home_E == rank)
            expert_RS[rank, : len(mine)] = mine
        placement_L.append(Placement(expert_RS=expert_RS))
    return Plan(placement_L=tuple(placement_L))


def answers_of(
    only: int | None,
    move_every: int,
    *,
    coherent: bool = False,
    top_k: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[int, bytes], int, int]:
    """only: the rank that gets all requests, None for all. -> every rank's answers; steps; moves"""
    peers = Peers.of(world_group())
    model = model_of(world_group(), top_k=top_k).to(dtype)
    schedule = Continuous(slots=3, tokens=9)
    path = Coherent(model, schedule, peers) if coherent else Ordinary(model, schedule)
    engine = Engine(path, schedule, SHAPE.length)
    answers: list[Answer] = []
    moves = [0]

    def between(step: int) -> None:
        if move_every and step % move_every == 0:
            moves[0] += move_experts(model, anywhere(peers.size, step)).moves

    requests = requests_of()
    mine = share_of(requests, peers) if only is None else [each for each in requests if only == peers.rank]
    steps = serve(engine, mine, Steps(), peers, deliver=answers.append, between=between)
    everything = [(a.request.id, a.text) for each in gather_objects(answers, peers) for a in each]
    assert len(everything) == len(requests), "a request was lost or answered twice"
    return dict(everything), steps, moves[0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_answers_what_one_process_answers_while_experts_move(world: Worlds, ranks: int) -> None:
    for answers, _, moves in world(ranks).run(answers_of, None, 6):
        assert answers == book()
        assert moves > 6


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_that_follow_their_experts_give_the_answers_of_one_process(world: Worlds, ranks: int) -> None:
    for top_k, move_every in ((1, 0), (2, 8)):
        follow = partial(answers_of, None, move_every, coherent=True, top_k=top_k)
        assert all(answers == book(top_k) for answers, _, _ in world(ranks).run(follow))


@pytest.mark.parametrize("coherent", [False, True], ids=["ordinary", "coherent"])
def test_in_fp32_only_a_decision_too_close_to_call_may_fall_otherwise(world: Worlds, coherent: bool) -> None:
    """Rounding depends on who shares a matmul. Where every choice of a byte and of an expert is clear of that, the
    answer is the same; float64 moves the line below anything that happens."""
    clear = {number for number, page in pages().items() if page.margin > 1e-4}
    assert len(clear) > 7
    assert min(page.margin for page in pages().values()) > 1e-10
    for answers, _, _ in world(2).run(partial(answers_of, None, 6, coherent=coherent, dtype=torch.float32)):
        assert all(answers[number] == book()[number] for number in clear)


def test_ranks_without_a_request_step_along(world: Worlds) -> None:
    parts = world(3).run(answers_of, 1, 0)
    assert all(answers == book() for answers, _, _ in parts)
    assert len({steps for _, steps, _ in parts}) == 1


def test_a_model_trained_on_two_ranks_generates_alike_on_one_two_and_three(world: Worlds, tmp_path: Path) -> None:
    world(2).run(trained, tmp_path / "run")
    requests = requests_of(10, Bursty(rate=1.0, burst=3.0))
    alone = generate(tmp_path / "run", requests, served(), tmp_path / "1")
    for ranks in (2, 3):
        results = world(ranks).run(generate, tmp_path / "run", requests, served(), tmp_path / str(ranks))
        assert answers_in(tmp_path / str(ranks)) == answers_in(tmp_path / "1")
        assert results[0]["tokens"] == alone["tokens"] == sum(request.new_tokens for request in requests)
        assert json.loads((tmp_path / str(ranks) / "result.json").read_text()) == results[0]


def test_the_same_run_again_is_the_same_latencies_included_and_replanning_changes_no_answer(
    world: Worlds, tmp_path: Path
) -> None:
    world(2).run(trained, tmp_path / "run")
    requests = requests_of(24)
    world(2).run(generate, tmp_path / "run", requests, served(), tmp_path / "once")
    world(2).run(generate, tmp_path / "run", requests, served(), tmp_path / "again")
    for name in ("rank0.jsonl", "rank1.jsonl", "steps.jsonl"):
        assert (tmp_path / "once" / name).read_text() == (tmp_path / "again" / name).read_text()
    replanned = world(2).run(generate, tmp_path / "run", requests, replace(served(), replan_every=20), tmp_path / "re")
    assert answers_in(tmp_path / "re") == answers_in(tmp_path / "once")
    assert replanned[0]["moves"] > 0
    assert sum(json.loads(line)["moves"] for line in (tmp_path / "re" / "steps.jsonl").read_text().splitlines()) > 0


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train one to the end"):
        generate(tmp_path, (), served(), tmp_path / "out")


def served() -> Served:
    return Served(schedule=Continuous(slots=3, tokens=9), clock="steps", dtype=torch.float64)


def answers_in(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for path in folder.glob("rank*.jsonl") for line in path.read_text().splitlines()]
    return {line["id"]: line["answer"] for line in lines}


def trained(folder: Path) -> None:
    shape = small("loss-free", experts=8, top_k=2)
    shape = replace(shape, layers=2, length=32, moe=replace(shape.moe, dim=16, hidden=16))
    trainer = Trainer(Run(shape=shape, steps=3, sequences=4), world_group())
    for layer in trainer.model.layers:
        layer.moe.router.price_E[::2] -= 0.5  # every other expert is cheap, and so hot; dealt to two, all on one rank
    train(trainer, folder)
