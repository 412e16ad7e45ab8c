"""Where does a token go? Decisions of one step: tensors or tables in, frozen records out; never the network."""

from routing.assigner import Assigner, AtHome
from routing.assignment import Assignment, Loan
from routing.balancer import Balancer, Unpriced
from routing.capacity import Capacity, Drop, Dropless
from routing.choice import NOWHERE, Choice
from routing.expert_choice import ExpertChoice
from routing.forced import ForcedRouter, forced_experts
from routing.least_loaded import BreakEven, LeastLoaded, Worth
from routing.losses import GlobalLoss, GShardLoss, Loss, SequenceLoss, SwitchLoss, ZLoss
from routing.mask_ratio import Constant, MaskRatio, Share
from routing.router import Router, check_routing
from routing.schedule import Sparsify
from routing.scores import Cosine, Score, Sigmoid, Softmax, SqrtSoftplus, at_least_fp32
from routing.select import Rows, Select, Tokens, TopK
from routing.threshold import Threshold
from routing.weigh import Weigh

__all__ = [
    "NOWHERE", "Assigner", "Assignment", "AtHome", "Balancer", "BreakEven", "Capacity", "Choice", "Constant",
    "Cosine", "Drop", "Dropless", "ExpertChoice", "ForcedRouter", "GShardLoss", "GlobalLoss", "LeastLoaded", "Loan",
    "Loss", "MaskRatio", "Router", "Rows", "Score", "Select", "SequenceLoss", "Share", "Sigmoid", "Softmax",
    "Sparsify", "SqrtSoftplus", "SwitchLoss", "Threshold", "Tokens", "TopK", "Unpriced", "Weigh", "Worth", "ZLoss",
    "at_least_fp32", "check_routing", "forced_experts",
]  # fmt: skip
