"""What torchtitan takes by name: --override.imports moe.integrations.torchtitan.overrides.<one of these>"""

from __future__ import annotations

from typing import Any

from torchtitan.config import derive, override
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from moe.integrations.torchtitan.dispatcher import Dispatcher
from moe.integrations.torchtitan.experts import BalancedExperts
from routing import LeastLoaded


@override(target=AllToAllTokenDispatcher.Config, description="evenmoe's dispatch, every expert at home", exact=True)  # type: ignore[untyped-decorator]
def at_home(config: Any) -> Any:
    return derive(config, Dispatcher.Config)


@override(target=RoutedExperts.Config, description="evenmoe's experts, which visit idle ranks", exact=True)  # type: ignore[untyped-decorator]
def least_loaded(config: Any, **settings: Any) -> Any:
    """settings: LeastLoaded's, as JSON: 'least_loaded={"headroom": 1.05}'."""
    return derive(config, BalancedExperts.Config, assigner=LeastLoaded(**settings))
