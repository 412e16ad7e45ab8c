"""Where does an expert live? Plans, made offline, of which rank holds which expert. numpy and a solver; never torch."""

from placement.advise import Advice, advise
from placement.affinity import Affinity
from placement.bounds import Certificate
from placement.calibrate import calibrate
from placement.certify import Verdict, verify
from placement.eplb import rebalance_experts
from placement.fewest import fewest_moves
from placement.greedy import Packed, Planner, RoundRobin
from placement.groups import PricedGroups, StrictGroups
from placement.ilp import Ilp, IlpWhole
from placement.merge import merge
from placement.migrate import Migration, Move, Wave, migrate, moved, nearest, padded
from placement.plan import Placement, Plan
from placement.rebalance import Rebalance
from placement.rename import as_given, rename, rename_nodes, rename_ranks
from placement.robust import Robust
from placement.simulate import ExpertShape, GemmCurve, Simulation, simulate
from placement.size import Size, size
from placement.tolerant import Tolerant
from placement.topology import INFINIBAND, NVLINK, Link, Topology
from placement.trace import LoadTrace

__all__ = [
    "INFINIBAND",
    "NVLINK",
    "Advice",
    "Affinity",
    "Certificate",
    "ExpertShape",
    "GemmCurve",
    "Ilp",
    "IlpWhole",
    "Link",
    "LoadTrace",
    "Migration",
    "Move",
    "Packed",
    "Placement",
    "Plan",
    "Planner",
    "PricedGroups",
    "Rebalance",
    "Robust",
    "RoundRobin",
    "Simulation",
    "Size",
    "StrictGroups",
    "Tolerant",
    "Topology",
    "Verdict",
    "Wave",
    "advise",
    "as_given",
    "calibrate",
    "fewest_moves",
    "merge",
    "migrate",
    "moved",
    "nearest",
    "padded",
    "rebalance_experts",
    "rename",
    "rename_nodes",
    "rename_ranks",
    "simulate",
    "size",
    "verify",
]
