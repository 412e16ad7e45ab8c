"""What moved between Megatron-Core 0.16 and 0.19, found by looking at signatures, not at version numbers.

What it calls, it calls with more keywords from release to release (is_mtp_layer, name); what builds a submodule was a
ModuleSpec and became any callable; a subclass of MoELayer was not told its process groups and now is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module


def taken_by(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the function, or a class's constructor, takes."""
    known = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return offered
    return {name: value for name, value in offered.items() if name in known}


def build(what: Any, *args: Any, **offered: Any) -> Any:
    """A submodule from a ModuleSpec, a class or any other callable, told whatever it takes."""
    if isinstance(what, ModuleSpec):
        return build_module(what, *args, **taken_by(what.module, offered))
    return what(*args, **taken_by(what, offered))


def module_of(spec: Any) -> Any:
    """The class that a spec builds, None if it cannot be told."""
    if isinstance(spec, ModuleSpec):
        return spec.module
    return spec.func if isinstance(spec, partial) else spec


def submodules_of(spec: Any) -> Any:
    """The submodules of a spec: 0.16's ModuleSpec, or the partial of later releases."""
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def groups_of(given: ProcessGroupCollection | None, bound: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """given: by whoever builds the layer; 0.16's TransformerLayer tells a subclass of MoELayer nothing. bound: in the
    spec. Without either, those of megatron.core.parallel_state."""
    return given or bound or get_default_pg_collection()
