"""The simulator, the advisor and sizing: laws that hold whatever the machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import LoadTrace, Packed, RoundRobin, Topology
from placement.advise import advise
from placement.calibrate import _numpy, calibrate
from placement.simulate import ExpertShape, GemmCurve, simulate
from placement.size import size
from tests.placement.strategies import choices, drawn_loads

SHAPE = ExpertShape(dim=64, hidden=32)
LINEAR = GemmCurve(rows=(0, 100), seconds=(0, 1e-3), source="measured: by hand")
TOPOLOGY = Topology.even(ranks=4, slots=8, ranks_per_node=2)


@pytest.mark.fast
def test_a_curve_passes_through_its_points_and_goes_on_at_its_last_slope() -> None:
    curve = GemmCurve(rows=(10, 20, 40), seconds=(1, 1, 3), source="by hand")
    np.testing.assert_allclose(curve(np.array([0.0, 5, 15, 30, 60])), [0, 1, 1, 2, 5])
    with pytest.raises(ValueError, match="two ascending rows or more"):
        GemmCurve(rows=(10,), seconds=(1,), source="")


@pytest.mark.fast
def test_a_curve_of_other_matrices_is_refused_and_one_made_by_hand_is_anyones() -> None:
    trace = drawn_loads(0, layers=1)
    plan = Packed()(trace, TOPOLOGY)
    for curve in (GemmCurve.modelled(SHAPE), calibrate(SHAPE, [1, 2], repeats=1)):
        simulate(plan, trace, TOPOLOGY, GemmCurve.read(vars(curve)), SHAPE)
        with pytest.raises(ValueError, match="the curve is of experts of 64 x 32, not 64 x 33"):
            simulate(plan, trace, TOPOLOGY, curve, ExpertShape(dim=64, hidden=33))
    simulate(plan, trace, TOPOLOGY, LINEAR, ExpertShape(dim=1, hidden=1))


@pytest.mark.fast
def test_matrices_take_as_long_as_the_busiest_rank() -> None:
    trace = drawn_loads(0, layers=3)
    plan = Packed()(trace, TOPOLOGY)
    run = simulate(plan, trace, TOPOLOGY, LINEAR, SHAPE)
    mean_L = trace.load_LE.sum(axis=1) / 4
    peak_L = [certificate.peak_over_mean for certificate in plan.certificate_L] * mean_L
    np.testing.assert_allclose(run.compute_WL[0], peak_L * 1e-5)
    assert run.measured == ("matrices: measured: by hand",)


@pytest.mark.fast
@given(st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_sending_a_token_once_to_a_rank_never_takes_longer_than_sending_every_row(seed: int) -> None:
    trace = choices(seed, tokens=50, layers=2, experts=16, top_k=4)
    topology = Topology.even(ranks=4, slots=4, ranks_per_node=2)
    plan = RoundRobin()(trace, topology)
    once = simulate(plan, trace, topology, LINEAR, SHAPE)
    every = simulate(plan, replace(trace, expert_TLK=None, window_T=None), topology, LINEAR, SHAPE)
    assert (once.link_WL <= every.link_WL + 1e-12).all()
    np.testing.assert_allclose(once.compute_WL, every.compute_WL)


@pytest.mark.fast
def test_one_rank_sends_nothing() -> None:
    trace = choices(0, tokens=50, layers=2, experts=4, top_k=2)
    alone = Topology.even(ranks=1, slots=4, ranks_per_node=1)
    assert simulate(RoundRobin()(trace, alone), trace, alone, LINEAR, SHAPE).link_WL.sum() == 0


def skewed(windows: int = 8) -> LoadTrace:
    """The same uneven load again and again: what is learnt from one window holds in the next."""
    random = np.random.default_rng(0)
    return LoadTrace(load_WLE=random.poisson(random.lognormal(0, 1, (3, 32)) * 60, (windows, 3, 32)) + 1.0)


# Experts so heavy, for so few rows, that lending one for a step costs more than it saves.
HEAVY = ExpertShape(dim=4096, hidden=4096)
STEEP = GemmCurve(rows=(0, 1000), seconds=(0, 3e-4), source="measured: by hand")


def test_a_lasting_imbalance_is_worth_a_move_and_the_break_even_says_when() -> None:
    advice = advise(skewed(), TOPOLOGY, running=None, curve=STEEP, shape=HEAVY, steps=10**5)
    chosen = next(option for option in advice.option_N if option.name == advice.choice)
    assert advice.choice == "re-place"
    assert chosen.gain > 0
    tokens = skewed().load_WLE.sum(axis=2).mean() / 4
    assert chosen.break_even_tokens == pytest.approx(chosen.move_seconds / chosen.gain * tokens, rel=0.05)
    assert (advice.fit_windows, advice.held_windows) == (4, 4)


def test_stay_is_the_answer_where_the_plan_is_good_already() -> None:
    trace = skewed()
    running = Packed()(trace, TOPOLOGY)
    advice = advise(trace, TOPOLOGY, running=running, curve=STEEP, shape=HEAVY)
    assert advice.choice == "stay"
    assert "no option pays" in advice.reason or "noise" in advice.reason


def test_stay_is_the_answer_where_the_move_would_never_pay() -> None:
    advice = advise(skewed(), TOPOLOGY, running=None, curve=STEEP, shape=HEAVY, steps=1)
    assert advice.choice == "stay"
    assert "pays for its move within 1 steps" in advice.reason


def test_light_experts_and_many_rows_are_better_lent_than_moved() -> None:
    trace = LoadTrace(load_WLE=skewed().load_WLE * 100)
    assert advise(trace, TOPOLOGY, running=None, curve=LINEAR, shape=SHAPE).choice == "least-loaded"


def test_spare_slots_are_offered_as_copies() -> None:
    roomy = Topology.even(ranks=4, slots=10, ranks_per_node=4)
    names = [option.name for option in advise(skewed(), roomy, running=None, curve=LINEAR, shape=SHAPE).option_N]
    assert names == ["stay", "re-place", "replicate", "least-loaded"]


@pytest.mark.fast
def test_advice_needs_windows_to_hold_out() -> None:
    with pytest.raises(ValueError, match="record more, or cut it"):
        advise(drawn_loads(0), TOPOLOGY, running=None, curve=LINEAR, shape=SHAPE)


def test_more_ranks_hold_less_and_more_slots_hold_more() -> None:
    few, many, spare = size(drawn_loads(0, layers=2), TOPOLOGY, [4], [0, 8], curve=LINEAR, shape=SHAPE) + size(
        drawn_loads(0, layers=2), TOPOLOGY, [8], [0], curve=LINEAR, shape=SHAPE
    )
    assert spare.expert_bytes < few.expert_bytes < many.expert_bytes
    assert few.expert_bytes == 8 * 2 * SHAPE.expert_bytes


def test_calibration_measures_what_it_is_asked_with_torch_or_without() -> None:
    done: list[int] = []
    curve = calibrate(SHAPE, [8, 2], repeats=1, done=done.append)
    assert (curve.rows, done) == ((2, 8), [2, 8])
    assert all(seconds > 0 for seconds in curve.seconds)
    run, source = _numpy(SHAPE)
    run(3)
    assert source.startswith("numpy")
    with pytest.raises(ValueError, match="two different numbers of rows"):
        calibrate(SHAPE, [8])
