"""evenmoe inside torchtitan's own MoE: its router, its weights, its parallel plan, our way of the tokens.

--override.imports 'moe.integrations.torchtitan.overrides.least_loaded={"headroom": 1.05}'
"""

from moe.integrations.require import require

require("torchtitan", at_least="0.3.0", extra="torchtitan")

from moe.integrations.torchtitan.dispatcher import Dispatcher  # noqa: E402
from moe.integrations.torchtitan.experts import BalancedExperts  # noqa: E402

__all__ = ["BalancedExperts", "Dispatcher"]
