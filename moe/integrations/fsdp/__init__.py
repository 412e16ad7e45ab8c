"""evenmoe's layer among torch's own parts: DTensor, DeviceMesh, FSDP2, torch.distributed.checkpoint.

parallelize_experts(model, mesh["ep"])
for block in model.blocks:
    shard(block, mesh=world, expert_mesh=mesh["efsdp"])
fully_shard(model, mesh=world)
"""

from moe.integrations.require import require

require("torch", at_least="2.13", extra="fsdp")

from moe.integrations.fsdp.plan import ExpertParallel, in_order, parallelize_experts  # noqa: E402
from moe.integrations.fsdp.shard import shard  # noqa: E402

__all__ = ["ExpertParallel", "in_order", "parallelize_experts", "shard"]
