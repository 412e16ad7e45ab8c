"""Where does a token go? Decisions of one step: tensors or tables in, frozen records out; never the network.

Meters of routings that are over, in numpy, are in `routing.congestion`, `routing.locality` and `routing.forecast`.
"""

from routing.assigner import Assigner, AtHome
from routing.assignment import Assignment, Loan
from routing.balancer import Balancer, Unpriced
from routing.bip import Bip
from routing.capacity import Drop, Dropless
from routing.choice import NOWHERE, Choice
from routing.cutoff import Cutoff
from routing.dual import dual_gap
from routing.forced import ForcedRouter, forced_experts
from routing.least_loaded import BreakEven, LeastLoaded, Worth
from routing.least_loaded_on_device import LeastLoadedOnDevice
from routing.loss_free import LossFree
from routing.losses import GlobalLoss, GShardLoss, Loss, SequenceLoss, SwitchLoss, ZLoss
from routing.metrics import Balance, max_vio, over_layers, rank_peak, rank_share, readings
from routing.nearest_copy import NearestCopy
from routing.quantile import EdgeQuantile, Quantile
from routing.router import Router, check_routing
from routing.schedule import Sparsify
from routing.scores import Score, Sigmoid, Softmax, at_least_fp32
from routing.select import Rows, Select, Tokens, TopK
from routing.sinkhorn import Sinkhorn
from routing.sinks import Console, JsonLines, Sink, TensorBoard
from routing.tally import Tally
from routing.waterfill import Waterfill
from routing.weigh import Weigh

__all__ = [
    "NOWHERE", "Assigner", "Assignment", "AtHome", "Balance", "Balancer", "Bip", "BreakEven", "Choice", "Console",
    "Cutoff", "Drop", "Dropless", "EdgeQuantile", "ForcedRouter", "GShardLoss", "GlobalLoss", "JsonLines",
    "LeastLoaded", "LeastLoadedOnDevice", "Loan", "Loss", "LossFree", "NearestCopy", "Quantile", "Router", "Rows",
    "Score", "Select", "SequenceLoss", "Sigmoid", "Sink", "Sinkhorn", "Softmax", "Sparsify", "SwitchLoss", "Tally",
    "TensorBoard", "Tokens", "TopK", "Unpriced", "Waterfill", "Weigh", "Worth", "ZLoss", "at_least_fp32",
    "check_routing", "dual_gap", "forced_experts", "max_vio", "over_layers", "rank_peak", "rank_share", "readings",
]  # fmt: skip
