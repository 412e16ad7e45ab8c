"""Make it so: the layer, the collectives under it, and the proofs that it is exact."""

from moe import checkpoint
from moe.activation import GELU, ReLU2, SwiGLU
from moe.backup import other_host
from moe.census import census
from moe.clip import clip_grad_norm, grad_norm
from moe.comm import EVERYONE, Server, World, WorldError, nodes_of
from moe.compute import Fastest, Fused, Grouped, Loop, Native
from moe.config import MoEConfig
from moe.coordinator import Coordinator
from moe.data_parallel import average_expert_grads, expert_parameters, leave_experts_alone
from moe.elastic import Elastic, Pulse
from moe.experts import Experts
from moe.guestbook import lasting_visits
from moe.guests import KeepGuests, RefetchGuests
from moe.layer import MoE
from moe.levy import charge
from moe.live import Live
from moe.meters import Meters
from moe.moving import Moved, move_experts, plan_of
from moe.outside import ReleasedError
from moe.overflow import share_overflow
from moe.parity import assert_ep_parity
from moe.planned import Capacity, CapacityError, Planned
from moe.prices import settle_after, settle_prices
from moe.record import Recorder
from moe.recovery import ExpertsLostError
from moe.reference import reference
from moe.shards import export_safetensors, import_safetensors
from moe.terms import Terms
from moe.training import StepLostError

__all__ = [
    "EVERYONE",
    "GELU",
    "Capacity",
    "CapacityError",
    "Coordinator",
    "Elastic",
    "Experts",
    "ExpertsLostError",
    "Fastest",
    "Fused",
    "Grouped",
    "KeepGuests",
    "Live",
    "Loop",
    "Meters",
    "MoE",
    "MoEConfig",
    "Moved",
    "Native",
    "Planned",
    "Pulse",
    "ReLU2",
    "Recorder",
    "RefetchGuests",
    "ReleasedError",
    "Server",
    "StepLostError",
    "SwiGLU",
    "Terms",
    "World",
    "WorldError",
    "assert_ep_parity",
    "average_expert_grads",
    "census",
    "charge",
    "checkpoint",
    "clip_grad_norm",
    "expert_parameters",
    "export_safetensors",
    "grad_norm",
    "import_safetensors",
    "lasting_visits",
    "leave_experts_alone",
    "move_experts",
    "nodes_of",
    "other_host",
    "plan_of",
    "reference",
    "settle_after",
    "settle_prices",
    "share_overflow",
]  # fmt: skip
