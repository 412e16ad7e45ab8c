"""Where does a token go? Decisions of one step: tensors or tables in, frozen records out; never the network."""

from routing.assigner import Assigner, AtHome
from routing.assignment import Assignment, Loan
from routing.balancer import Balancer, Unpriced
from routing.choice import NOWHERE, Choice
from routing.least_loaded import BreakEven, LeastLoaded, Worth
from routing.router import ForcedRouter, Router, Weigh, forced_experts
from routing.scores import Score, Sigmoid, Softmax, at_least_fp32
from routing.select import Rows, Select, TopK

__all__ = [
    "NOWHERE", "Assigner", "Assignment", "AtHome", "Balancer", "BreakEven", "Choice", "ForcedRouter", "LeastLoaded",
    "Loan", "Router", "Rows", "Score", "Select", "Sigmoid", "Softmax", "TopK", "Unpriced", "Weigh", "Worth",
    "at_least_fp32", "forced_experts",
]  # fmt: skip
