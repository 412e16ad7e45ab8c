"""Where does an expert live? Plans, made offline, of which rank holds which expert. numpy only, never torch."""

from placement.bounds import Certificate
from placement.greedy import Packed, Planner, RoundRobin
from placement.merge import merge
from placement.plan import Placement, Plan
from placement.topology import INFINIBAND, NVLINK, Link, Topology
from placement.trace import LoadTrace

__all__ = [
    "INFINIBAND",
    "NVLINK",
    "Certificate",
    "Link",
    "LoadTrace",
    "Packed",
    "Placement",
    "Plan",
    "Planner",
    "RoundRobin",
    "Topology",
    "merge",
]
