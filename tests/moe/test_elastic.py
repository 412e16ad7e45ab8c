"""The closed loop: it moves experts where that pays, once, and otherwise lets them be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from moe import Elastic, World, plan_of
from placement import Advice, ExpertShape, GemmCurve, Packed, Topology, advise
from tests.moe.test_checkpoint import Net, assert_same, optimizer_of, together, whole

Worlds = Callable[[int], World]
TOPOLOGY = Topology.even(ranks=2, slots=3, ranks_per_node=2)
SHAPE = ExpertShape(dim=6, hidden=4)
LINEAR = GemmCurve(rows=(0, 100), seconds=(0, 1e-3), source="measured: by hand")
ODD, EVEN = [90.0, 10, 90, 10, 90, 10], [50.0] * 6  # dealt round, rank 0 holds experts 0, 2 and 4


def loop(net: Net, **more: Any) -> Elastic:
    settings: dict[str, Any] = {"plan_every": 4, "window": 1, "planner": Packed(), "patience": 1}
    judge = partial(advise, curve=LINEAR, shape=SHAPE, steps=100)
    return Elastic(net, optimizer_of(net), TOPOLOGY, **settings | {"advise": judge} | more)


def hear(net: Net, elastic: Elastic, load_E: Sequence[float]) -> int:
    """A step in which the experts of both layers had this load. -> moves"""
    for layer in (net.first, net.last):
        layer.router.closed = {"kept_E": torch.tensor(load_E, dtype=torch.float64)}
    moved = elastic.step()
    return 0 if moved is None else moved.moves


def peak(net: Net, load_E: Sequence[float]) -> float:
    load_R = plan_of(net).placement_L[0].held_RE @ np.array(load_E)
    return float(load_R.max() / load_R.mean())


def test_a_steady_skew_moves_experts_once_and_changes_no_weight(world: Worlds) -> None:
    parts = world(2).run(_steady)
    for moves, before, after, _, _ in parts:
        assert [step for step, count in enumerate(moves) if count] == [3]
        assert before == pytest.approx(1.8)
        assert after < 1.3
    assert_same(together([end for *_, end in parts]), together([start for *_, start, _ in parts]))


def _steady() -> tuple[list[int], float, float, dict[str, Any], dict[str, Any]]:
    net = Net()
    elastic, before, start = loop(net), peak(net, ODD), whole(net, optimizer_of(net))
    moves = [hear(net, elastic, ODD) for _ in range(16)]
    return moves, before, peak(net, ODD), start, whole(net, optimizer_of(net))


@pytest.mark.parametrize("case", ["even", "noise", "passing", "free", "rerouting"])
def test_where_a_move_would_not_pay_nothing_moves(world: Worlds, case: str) -> None:
    for moves, reason in world(2).run(_still, case):
        assert moves == 0
        assert reason.startswith("stay: ")


def _still(case: str) -> tuple[int, str]:
    net, random = Net(), np.random.default_rng(0)
    judge = partial(advise, curve=LINEAR, shape=SHAPE, steps=1 if case == "free" else 100)
    if case == "free":  # the gain is real, but the link is so slow that no step of this run would see it
        slow = GemmCurve(rows=(0, 100), seconds=(0, 1e-12), source="measured: by hand")
        judge = partial(advise, curve=slow, shape=SHAPE, steps=1)
    elastic = loop(net, advise=judge, patience=2, windows=4)
    moves = 0
    for step in range(16):
        load_E: Any = EVEN
        if case == "noise":
            load_E = 50 + random.normal(0, 0.2, 6)
        elif (case == "passing" and 4 <= step < 8) or case == "free":
            load_E = ODD
        elif case == "rerouting":
            load_E = [300.0, 1, 1, 1, 1, 1]  # one hot expert: to lend it would help, to move it would not
        moves += hear(net, elastic, load_E)
    return moves, elastic.pulse.reason


def test_a_migration_goes_on_at_later_boundaries_until_it_is_done(world: Worlds) -> None:
    for moves, left in world(2).run(_slowly):
        assert sum(moves) > max(moves) == 2, "each rank sends one expert and receives one"
        assert moves[:3] == [0, 0, 0]
        assert left[3] > 0 == left[-1]


def _slowly() -> tuple[list[int], list[int]]:
    net = Net()
    weight = 4 * (8 * 6 + 8 + 4 * 6 + 6)
    elastic = loop(net, most_bytes=weight)
    moves, left = [], []
    for _ in range(12):
        moves.append(hear(net, elastic, ODD))
        left.append(elastic.pulse.left)
    return moves, left


@pytest.mark.fast
def test_the_pulse_tells_how_long_ago_the_loop_last_did_something() -> None:
    net = Net()
    elastic = loop(net)
    with pytest.raises(ValueError, match="no step was settled yet"):
        elastic.step()
    elastic.topology = Topology.even(ranks=1, slots=6, ranks_per_node=1)
    for _ in range(6):
        hear(net, elastic, ODD)
    pulse = elastic.pulse
    assert (pulse.step, pulse.steps_since_plan, pulse.steps_since_commit) == (6, 2, math.inf)
    assert 0 <= pulse.seconds_since_step < math.inf
    assert pulse.reason.startswith("stay: ")
    assert pulse.readings()["elastic"]["steps_since_plan"] == 2
    with pytest.raises(ValueError, match="plan_every, window and patience must be >= 1"):
        loop(net, plan_every=0)


@pytest.mark.fast
def test_advice_is_given_again_without_an_option_that_is_not_open() -> None:
    net = Net()
    seen: list[Advice] = []

    def judge(*args: Any, **more: Any) -> Advice:
        seen.append(advise(*args, curve=LINEAR, shape=SHAPE, steps=100, **more))
        return seen[-1]

    elastic = loop(net, advise=judge)
    elastic.topology = Topology.even(ranks=1, slots=6, ranks_per_node=1)
    for _ in range(4):
        hear(net, elastic, ODD)
    assert "least-loaded" in [option.name for option in seen[0].option_N]
    assert "least-loaded" not in [option.name for option in seen[0].without("least-loaded").option_N]
    assert seen[0].plan is None
