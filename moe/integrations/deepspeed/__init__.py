"""MoE layers under a DeepSpeed engine, with ZeRO stage 0, 1 or 2.

group = expert_group(ep_size=8)                                # DeepSpeed's own; build the layers with it
engine, *rest = initialize(model=model, config=config)         # in the place of deepspeed.initialize
engine.backward(loss)
engine.step()                                                  # prices are settled here, once per optimiser step
"""

from moe.integrations.require import require

require("deepspeed", at_least="0.19.8", extra="deepspeed")

from moe.integrations.deepspeed.engine import Engine, initialize  # noqa: E402
from moe.integrations.deepspeed.groups import expert_group  # noqa: E402

__all__ = ["Engine", "expert_group", "initialize"]
