"""Finishing a plan with its certificates, and checking the certificates of a finished plan without a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placement.arrays import FloatArray
from placement.bounds import CLOSED_FORM, Certificate, peak_bound_L
from placement.domains import domains_E
from placement.hops import local_bound_L
from placement.metrics import local_L, local_share, peak_over_mean_L
from placement.plan import Placement, Plan, Provenance
from placement.topology import Topology
from placement.trace import LoadTrace

# Values go through JSON and are summed in other orders.
SLACK = 1e-6


def certified(
    placement_L: Sequence[Placement],
    trace: LoadTrace,
    topology: Topology,
    provenance: Provenance,
) -> Plan:
    """A plan with a closed-form certificate for each layer, on the load of all windows together."""
    plan = Plan(
        placement_L=tuple(placement_L),
        topology=topology,
        layer_L=trace.layer_L,
        provenance={**provenance, "trace": trace.fingerprint},
    )
    value_L = peak_over_mean_L(plan, trace.load_LE, topology)
    return replace(plan, certificate_L=certificates(value_L, peak_bound_L(trace.load_LE, topology)))


def certificates(value_L: FloatArray, bound_L: FloatArray) -> tuple[Certificate, ...]:
    """A value that rounding put below its bound has gap 0."""
    return tuple(
        Certificate(bound=float(bound), gap=max(float(value / bound) - 1.0, 0.0), method=CLOSED_FORM)
        for value, bound in zip(value_L, bound_L, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check of one layer's certificate found. faults is empty for a certificate that holds.

    value, bound: recomputed from the trace. claimed: the certificate's bound. unproved: a claim rests on a solver or a
    search, so it was checked against the value and the closed form but not proved again; or it is about hops that the
    trace does not know. What provenance says of all layers is judged with the first.
    """

    layer: int
    value: float
    bound: float
    claimed: float
    unproved: bool
    faults: tuple[str, ...]


def verify(plan: Plan, trace: LoadTrace) -> tuple[Verdict, ...]:
    """A verdict for each layer, in closed form: no solver is called."""
    if plan.topology is None:
        raise ValueError("the plan does not name its topology, so its bounds cannot be recomputed; plan again")
    if not plan.certificate_L:
        raise ValueError("the plan has no certificates; plan again with a planner")
    value_L = peak_over_mean_L(plan, trace.load_LE, plan.topology)
    bound_L = peak_bound_L(trace.load_LE, plan.topology)
    more_faults_L: list[list[str]] = [[] for _ in range(trace.layers)]
    unproved_L = [c.local is not None or c.local_bound is not None for c in plan.certificate_L]
    if trace.follow_LEE is not None and len(trace.follow_LEE):
        stay_L = local_L(plan, trace.follow_LEE, range(plan.ranks))
        most_L = local_bound_L(trace.follow_LEE, plan.topology)
        for layer, hops in enumerate(zip(plan.certificate_L, stay_L.tolist(), most_L.tolist(), strict=False)):
            more_faults_L[layer], unproved_L[layer] = _hop_faults(*hops), False
        more_faults_L[0] += _whole_faults(plan, trace.follow_LEE, np.maximum(stay_L, most_L))
    for layer, placement in enumerate(plan.placement_L):
        more_faults_L[layer] += _tolerance_faults(placement, plan.topology, plan.provenance)
    # That a search over hops found the optimum is not proved again; nor is a claim about hops that the trace lacks.
    unproved_L[0] |= plan.provenance.get("hops") == "optimal"
    return tuple(
        _verdict(layer, float(value), float(bound), certificate, hop_faults, unproved)
        for layer, value, bound, certificate, hop_faults, unproved in zip(
            plan.layer_L, value_L, bound_L, plan.certificate_L, more_faults_L, unproved_L, strict=True
        )
    )


def _verdict(
    layer: int, value: float, bound: float, certificate: Certificate, hop_faults: list[str], hops_unproved: bool
) -> Verdict:
    faults = []
    unproved = not certificate.method.startswith(CLOSED_FORM)
    if abs(certificate.peak_over_mean - value) > SLACK * value:
        faults.append(f"claims a peak/mean of {certificate.peak_over_mean:.6f}; it is {value:.6f}")
    if certificate.bound > value * (1 + SLACK):
        faults.append(f"claims that nothing is below {certificate.bound:.6f}; this plan is, with {value:.6f}")
    elif not unproved and certificate.bound > bound * (1 + SLACK):
        faults.append(f"claims a bound of {certificate.bound:.6f}; the closed form gives {bound:.6f}")
    if certificate.gap < 0 or certificate.bound < 1 - SLACK:
        faults.append(f"claims an impossible bound {certificate.bound:.6f} or gap {certificate.gap:.6f}")
    return Verdict(
        layer=layer,
        value=value,
        bound=bound,
        claimed=certificate.bound,
        unproved=unproved or hops_unproved,
        faults=(*faults, *hop_faults),
    )


def _hop_faults(certificate: Certificate, stay: float, most: float) -> list[str]:
    """What a certificate says of hops, against the share that stays and the bound recomputed here."""
    faults = []
    if certificate.local is not None and abs(certificate.local - stay) > SLACK:
        faults.append(f"claims that a share of {certificate.local:.6f} stays local; it is {stay:.6f}")
    if certificate.local_bound is not None and certificate.local_bound < max(stay, most) - SLACK:
        faults.append(f"claims that at most {certificate.local_bound:.6f} can stay local; the bound is {most:.6f}")
    return faults


def _whole_faults(plan: Plan, pair_LEE: FloatArray, most_L: FloatArray) -> list[str]:
    """What provenance says of the hops of all layers together."""
    mass_L = pair_LEE.sum(axis=(1, 2))
    stay = local_share(plan, pair_LEE, range(plan.ranks))
    most = float((most_L * mass_L).sum() / max(mass_L.sum(), np.finfo(float).tiny))
    faults = []
    if (local := plan.provenance.get("local")) is not None and not abs(float(local) - stay) <= SLACK:
        faults.append(f"provenance claims that a share of {local} stays local; it is {stay:.6f}")
    if (bound := plan.provenance.get("local_bound")) is not None and not float(bound) >= most - SLACK:
        faults.append(f"provenance claims that at most {bound} can stay local; the bound is {most:.6f}")
    return faults


def _tolerance_faults(placement: Placement, topology: Topology, provenance: Provenance) -> list[str]:
    """What provenance says of losses that a layer survives."""
    if (claimed := provenance.get("tolerates")) is None:
        return []
    few_E = domains_E(placement, topology)
    worst = int(few_E.argmin())
    if few_E[worst] > int(claimed):
        return []
    return [f"claims to survive {claimed} lost failure domains; expert {worst} lives in {few_E[worst]}"]
