"""Finishing a plan with its certificates, and checking the certificates of a finished plan without a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.arrays import FloatArray
from placement.bounds import CLOSED_FORM, Certificate, peak_bound_L
from placement.hops import local_bound_L
from placement.metrics import local_L, peak_over_mean_L
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

    value, bound: recomputed from the trace. claimed: the certificate's bound. unproved: the claim rests on a solver, so
    it was checked against the value and the closed form but not proved again.
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
    hop_faults_L: list[list[str]] = [[]] * trace.layers
    if trace.follow_LEE is not None and any(certificate.local is not None for certificate in plan.certificate_L):
        stay_L = local_L(plan, trace.follow_LEE, range(plan.ranks))
        most_L = local_bound_L(trace.follow_LEE, plan.topology)
        hops = zip(plan.certificate_L, stay_L.tolist(), most_L.tolist(), strict=False)
        hop_faults_L[: trace.layers - 1] = [_hop_faults(*hop) for hop in hops]
    return tuple(
        _verdict(layer, float(value), float(bound), certificate, hop_faults)
        for layer, value, bound, certificate, hop_faults in zip(
            plan.layer_L, value_L, bound_L, plan.certificate_L, hop_faults_L, strict=True
        )
    )


def _verdict(layer: int, value: float, bound: float, certificate: Certificate, hop_faults: list[str]) -> Verdict:
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
        unproved=unproved,
        faults=(*faults, *hop_faults),
    )


def _hop_faults(certificate: Certificate, stay: float, most: float) -> list[str]:
    """What a certificate says of hops, against the share that stays and the bound recomputed here."""
    if certificate.local is None or certificate.local_bound is None:
        return []
    faults = []
    if abs(certificate.local - stay) > SLACK:
        faults.append(f"claims that a share of {certificate.local:.6f} stays local; it is {stay:.6f}")
    if certificate.local_bound < max(stay, most) - SLACK:
        faults.append(f"claims that at most {certificate.local_bound:.6f} can stay local; the bound is {most:.6f}")
    return faults
