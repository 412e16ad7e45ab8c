from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placement import Packed, Topology
from placement.groups import PricedGroups, StrictGroups, stray_L
from placement.metrics import peak_over_mean_L
from tests.placement.contracts import assert_keeps_the_planner_contract
from tests.placement.strategies import drawn_loads

TOPOLOGY = Topology.even(ranks=8, slots=5, ranks_per_node=2)


@given(
    st.integers(0, 99),
    st.sampled_from([4, 8]),
    st.sampled_from([(5,) * 8, (6, 4, 6, 4, 5, 5, 4, 6)]),
    st.integers(2, 5),
)
@settings(max_examples=8, deadline=None)
def test_strict_groups_stay_whole_on_a_node(seed: int, groups: int, slots_R: tuple[int, ...], node: int) -> None:
    topology = Topology(slots_R=slots_R, ranks_per_node=node)
    room = [sum(slots_R[at : at + node]) // (32 // groups) for at in range(0, 8, node)]
    assume(sum(room) >= groups)
    trace = drawn_loads(seed, layers=2)
    plan = assert_keeps_the_planner_contract(StrictGroups(groups=groups), trace, topology)
    np.testing.assert_allclose(stray_L(plan.placement_L, trace.load_LE, topology, groups), 0, atol=1e-12)


def test_a_higher_price_never_buys_more_stray_load_and_no_price_buys_balance() -> None:
    trace = drawn_loads(3, layers=6)
    cost = []
    for price in (0.0, 0.1, 10.0):
        plan = assert_keeps_the_planner_contract(PricedGroups(groups=8, price=price), trace, TOPOLOGY)
        peak = peak_over_mean_L(plan, trace.load_LE, TOPOLOGY)
        stray = stray_L(plan.placement_L, trace.load_LE, TOPOLOGY, 8)
        cost.append((peak.mean(), stray.mean(), peak + price * stray))
    flat = peak_over_mean_L(Packed()(trace, TOPOLOGY), trace.load_LE, TOPOLOGY)
    strict = peak_over_mean_L(StrictGroups(groups=8)(trace, TOPOLOGY), trace.load_LE, TOPOLOGY)
    assert cost[0][0] <= flat.mean() + 1e-9
    assert (cost[1][2] <= strict + 1e-9).all()
    assert cost[0][1] >= cost[1][1] >= cost[2][1]
    np.testing.assert_allclose(cost[2][1], 0, atol=1e-12)


def test_groups_that_do_not_divide_or_fit_say_so() -> None:
    trace = drawn_loads(0, layers=1)
    with pytest.raises(ValueError, match="32 experts do not divide into 5 groups; use a divisor of 32"):
        StrictGroups(groups=5)(trace, TOPOLOGY)
    with pytest.raises(ValueError, match="2 groups of 16 experts do not fit nodes with room for"):
        StrictGroups(groups=2)(trace, TOPOLOGY)
    with pytest.raises(ValueError, match="price"):
        PricedGroups(groups=4, price=-1)
