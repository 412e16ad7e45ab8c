"""Where does an expert live? Plans, made offline, of which rank holds which expert. numpy only, never torch."""

from placement.greedy import RoundRobin
from placement.plan import Certificate, Placement, Plan
from placement.topology import INFINIBAND, NVLINK, Link, Topology

__all__ = ["INFINIBAND", "NVLINK", "Certificate", "Link", "Placement", "Plan", "RoundRobin", "Topology"]
