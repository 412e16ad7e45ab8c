"""initialize: in the place of deepspeed.initialize, for models with MoE layers.

An engine does most of it right once it knows the layers (see `mark`): it sums an expert's gradient over the ranks that
hold the expert and divides by all, and ZeRO-1 and 2 count each expert once in the norm. Three things it does not:
without ZeRO it clips by the mean of the ranks' norms, each of its own experts; a checkpoint leaves out the prices of a
layer whose name has "expert" in it; and nobody settles the prices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor, nn
from torch.optim import Optimizer

from moe import checkpoint
from moe.census import Pool
from moe.clip import clip_grad_norm
from moe.comm import Folder
from moe.integrations.deepspeed.layer import is_numbered, mark, named_by_number
from moe.prices import settle_prices
from routing import Router

STAGES = "use zero_optimization stage 0, 1 or 2: expert parallelism has cut the experts already"


class Engine(DeepSpeedEngine):  # type: ignore[misc]
    """A DeepSpeedEngine that counts each expert once, saves the experts it has, and settles prices."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """As ever; and where it was a boundary of gradient accumulation and the step was not skipped, prices settle."""
        super().step(*args, **kwargs)
        if self.was_step_applied():
            settle_prices(self.module, self.seq_data_parallel_group)

    def clip_fp32_gradients(self) -> None:
        """Without ZeRO, in fp32."""
        self._global_grad_norm = clip_grad_norm(self.module, self.gradient_clipping())

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """As ever. What routers have seen of a step that is not done is not kept, as gradients are not."""
        with named_by_number(self.module):
            return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(
        self,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        **others: Any,
    ) -> Any:
        """As ever. Weights alone, also from another ep_size; with the optimiser's states, from the same."""
        with named_by_number(self.module, weights_alone=load_module_only or not load_optimizer_states):
            answer = super().load_checkpoint(
                load_dir,
                tag,
                load_module_strict=load_module_strict,
                load_optimizer_states=load_optimizer_states,
                load_lr_scheduler_states=load_lr_scheduler_states,
                load_module_only=load_module_only,
                **others,
            )
        self._begin_step()
        return answer

    def load_weights(self, folder: Folder) -> None:
        """The weights of `moe.checkpoint.save(folder, engine.module)`, written with any ep_size and placement, on any
        number of ranks, under an engine or not. The optimiser keeps what it has but for its copy of the weights."""
        checkpoint.load(folder, self.module)
        if hasattr(self.optimizer, "refresh_fp32_params"):
            self.optimizer.refresh_fp32_params()
        self._begin_step()

    def _begin_step(self) -> None:
        for module in self.module.modules():
            if isinstance(module, Router):
                for stat in module.stats.values():
                    stat.zero_()
            elif isinstance(module, Pool):
                module.reset()

    def _get_non_moe_state_dict(self, full_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in full_state_dict.items() if not is_numbered(key)}


def initialize(
    *,
    model: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    config: Mapping[str, Any] | str | Path,
    lr_scheduler: Any = None,
    **others: Any,
) -> tuple[Engine, Any, Any, Any]:
    """`deepspeed.initialize`, for a model with MoE layers whose group is `expert_group(...)`. -> what that returns

    Parameters of experts are put into groups of their own, as DeepSpeed needs; each keeps the settings of the one it
    was in.
    """
    _check(model, config, others)
    mark(model)
    if isinstance(optimizer, Optimizer):
        groups = len(optimizer.param_groups)
        optimizer.param_groups[:] = _split(optimizer.param_groups)
        if len(getattr(lr_scheduler, "base_lrs", [])) == groups != len(optimizer.param_groups):
            raise ValueError(
                "the learning-rate scheduler was made before experts got groups of their own; give a function that "
                "makes it: lr_scheduler=lambda optimizer: ..."
            )
    else:
        trained = (weight for weight in model.parameters() if weight.requires_grad)
        model_parameters = _split(_as_groups(trained if model_parameters is None else model_parameters))
    engine, *rest = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        config=config if isinstance(config, Mapping) else str(config),
        lr_scheduler=lr_scheduler,
        **others,
    )
    if type(engine) is not DeepSpeedEngine:
        raise ValueError(f"this config makes a {type(engine).__name__}; MoE layers work under a plain DeepSpeedEngine")
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        raise ValueError(
            "without ZeRO, DeepSpeed's optimizer for half precision leaves the experts out of the gradient norm; use "
            "zero_optimization stage 1 or 2, or fp32"
        )
    engine.__class__ = Engine
    return engine, *rest


def _check(model: nn.Module, config: Mapping[str, Any] | str | Path, others: Mapping[str, Any]) -> None:
    if isinstance(model, PipelineModule) or others.get("mpu") is not None:
        raise ValueError("MoE layers work under data and expert parallelism; leave out PipelineModule and mpu")
    settings = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    if (stage := settings.get("zero_optimization", {}).get("stage", 0)) > 2:
        raise ValueError(f"ZeRO-{stage} cannot hold these MoE layers; {STAGES}")
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(f"the model was built under deepspeed.zero.Init, which is ZeRO-3; {STAGES}")


def _as_groups(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    listed = list(parameters)
    if listed and not isinstance(listed[0], Tensor):
        return [dict(group) for group in listed]
    return [{"params": listed}]


def _split(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of DeepSpeed's function, which wants names that are all different, and leaves groups without parameters."""
    if any(group.get("moe") for group in groups):
        return groups
    taken: set[str] = set()
    for number, group in enumerate(groups):
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if group.setdefault("name", f"group {number}") in taken:
            group["name"] = f"{group['name']}, {number}"
        taken.add(group["name"])
    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]
