"""What every Planner promises, whatever it optimises."""

from __future__ import annotations

import numpy as np

from placement import LoadTrace, Planner, Topology
from placement.certify import verify
from placement.metrics import peak_over_mean_L
from placement.plan import EMPTY, Plan


def assert_keeps_the_planner_contract(planner: Planner, trace: LoadTrace, topology: Topology) -> Plan:
    """A whole, certified, reproducible plan. (That no rank holds an expert twice is a law of Placement itself.)"""
    plan = planner(trace, topology)
    assert len(plan.placement_L) == trace.layers
    for placement in plan.placement_L:
        assert placement.num_experts == trace.num_experts
        assert ((placement.expert_RS != EMPTY).sum(axis=1) <= np.array(topology.slots_R)).all()
    assert plan.topology == topology
    assert plan.layer_L == trace.layer_L
    assert plan.provenance["trace"] == trace.fingerprint
    value_L = peak_over_mean_L(plan, trace.load_LE, topology)
    for value, certificate in zip(value_L, plan.certificate_L, strict=True):
        assert 1 - 1e-9 <= certificate.bound <= value * (1 + 1e-9)
        np.testing.assert_allclose(certificate.peak_over_mean, value, rtol=1e-6)
        assert certificate.status == "optimal" or certificate.gap > 0
    assert not [fault for verdict in verify(plan, trace) for fault in verdict.faults]
    assert planner(trace, topology).to_json() == plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan
    return plan
