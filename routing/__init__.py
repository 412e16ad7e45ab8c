"""Where does a token go? Decisions of one step: tensors or tables in, frozen records out; never the network.

Meters of routings that are over, in numpy, are in `routing.congestion`, `routing.locality` and `routing.forecast`.
"""

from routing.assigner import Assigner, AtHome
from routing.assignment import Assignment, Loan
from routing.balancer import Balancer, Unpriced
from routing.bip import Bip
from routing.capacity import Capacity, Drop, Dropless
from routing.choice import NOWHERE, Choice
from routing.cutoff import Cutoff
from routing.decide_on_device import Decision, decide_on_device
from routing.dual import dual_change, dual_gap, dual_value, kept_score
from routing.expert_choice import ExpertChoice
from routing.flow_on_device import flow_on_device
from routing.forced import ForcedRouter, forced_experts
from routing.interior import optimize
from routing.least_loaded import BreakEven, LeastLoaded, Worth
from routing.least_loaded_on_device import LeastLoadedOnDevice
from routing.likeness import outside_autocast
from routing.loss_free import LossFree
from routing.losses import GlobalLoss, GShardLoss, Loss, SequenceLoss, SwitchLoss, ZLoss
from routing.mask_ratio import Constant, MaskRatio, Share
from routing.metrics import Balance, max_vio, over_layers, rank_peak, rank_share, readings
from routing.native import DECIDERS, Library, python_only
from routing.nearest_copy import NearestCopy
from routing.quantile import EdgeQuantile, Quantile
from routing.replay import Flips, RouteLog, Routes, flips, record_routes, replay_routes
from routing.router import Router, check_routing
from routing.schedule import Sparsify
from routing.scores import Cosine, Score, Sigmoid, Softmax, SqrtSoftplus, at_least_fp32
from routing.select import Rows, Select, Tokens, TopK, token_major
from routing.sinkhorn import Sinkhorn
from routing.sinks import Console, JsonLines, Sink, TensorBoard
from routing.tally import Tally
from routing.threshold import Threshold
from routing.waterfill import Waterfill
from routing.weigh import Weigh

__all__ = [
    "DECIDERS",
    "NOWHERE",
    "Assigner",
    "Assignment",
    "AtHome",
    "Balance",
    "Balancer",
    "Bip",
    "BreakEven",
    "Capacity",
    "Choice",
    "Console",
    "Constant",
    "Cosine",
    "Cutoff",
    "Decision",
    "Drop",
    "Dropless",
    "EdgeQuantile",
    "ExpertChoice",
    "Flips",
    "ForcedRouter",
    "GShardLoss",
    "GlobalLoss",
    "JsonLines",
    "LeastLoaded",
    "LeastLoadedOnDevice",
    "Library",
    "Loan",
    "Loss",
    "LossFree",
    "MaskRatio",
    "NearestCopy",
    "Quantile",
    "RouteLog",
    "Router",
    "Routes",
    "Rows",
    "Score",
    "Select",
    "SequenceLoss",
    "Share",
    "Sigmoid",
    "Sink",
    "Sinkhorn",
    "Softmax",
    "Sparsify",
    "SqrtSoftplus",
    "SwitchLoss",
    "Tally",
    "TensorBoard",
    "Threshold",
    "Tokens",
    "TopK",
    "Unpriced",
    "Waterfill",
    "Weigh",
    "Worth",
    "ZLoss",
    "at_least_fp32",
    "check_routing",
    "decide_on_device",
    "dual_change",
    "dual_gap",
    "dual_value",
    "flips",
    "flow_on_device",
    "forced_experts",
    "kept_score",
    "max_vio",
    "optimize",
    "outside_autocast",
    "over_layers",
    "python_only",
    "rank_peak",
    "rank_share",
    "readings",
    "record_routes",
    "replay_routes",
    "token_major",
]  # fmt: skip
