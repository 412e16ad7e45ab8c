"""The experts of this rank in the core's layout, as Megatron would have started, marked and saved them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe.experts import Experts
from moe.integrations.megatron.sharding import Where, nothing_more, shard_by_expert
from placement import Placement

NAMES = {
    "up": "linear_fc1.weight",
    "down": "linear_fc2.weight",
    "up_bias": "linear_fc1.bias",
    "down_bias": "linear_fc2.bias",
}
EXTRA = "._extra_state"


@dataclass(frozen=True, kw_only=True)
class HostActivation:
    """The activation that a TransformerConfig asks for, as Megatron's MLP computes it."""

    function: Callable[[Tensor], Tensor]
    gated: bool
    clamp: float | None
    offset: float

    @classmethod
    def of(cls, config: TransformerConfig) -> HostActivation:
        return cls(
            function=config.activation_func,
            gated=config.gated_linear_unit,
            clamp=config.activation_func_clamp_value,
            offset=config.glu_linear_offset,
        )

    @property
    def fan(self) -> int:
        return 2 if self.gated else 1

    def __call__(self, h_MF: Tensor) -> Tensor:
        if not self.gated:
            return self.function(h_MF)
        gate_MF, linear_MF = h_MF.chunk(2, dim=-1)
        if self.clamp is not None:
            gate_MF, linear_MF = gate_MF.clamp(max=self.clamp), linear_MF.clamp(-self.clamp, self.clamp)
        return self.function(gate_MF) * (linear_MF + self.offset if self.offset else linear_MF)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function)) + (", gated" if self.gated else "")


class CoreExperts(Experts):
    """Started by the config's init methods, each expert from a seed of its own, so that any number of ranks starts
    alike. Megatron's DDP and optimiser reduce them over the expert-data-parallel group: `allreduce=False`."""

    def __init__(self, config: TransformerConfig, expert_ids: Sequence[int]) -> None:
        super().__init__(
            config.hidden_size,
            config.moe_ffn_hidden_size or config.ffn_hidden_size,
            expert_ids,
            activation=HostActivation.of(config),
            bias=config.add_bias_linear,
            device="meta",
            dtype=config.params_dtype,
        )
        self.to_empty(device="cpu" if config.use_cpu_initialization else torch.cuda.current_device())
        self._start(config)
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            set_tensor_model_parallel_attributes(
                parameter, True, 0, 1
            )  # counted on every rank of a tensor-parallel group

    @torch.no_grad()
    def _start(self, config: TransformerConfig) -> None:
        seed = int(torch.randint(2**62, (), device="cpu"))
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                bias.zero_()
        if not config.perform_initialization:
            return
        for slot, expert in enumerate(self.expert_ids):
            for number, (weight, start) in enumerate(
                ((self.up, config.init_method), (self.down, config.output_layer_init_method))
            ):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed((seed + 0x9E3779B97F4A7C15 * (2 * expert + number + 1)) % 2**63)
                    drawn = torch.empty(weight.shape[1:], device="cpu", dtype=torch.float32)
                    start(drawn)
                weight[slot].copy_(drawn)

    def shards(
        self,
        placement: Placement,
        rank: int,
        replica: int,
        prefix: str,
        offsets: tuple[Any, ...],
        metadata: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """For megatron.core.dist_checkpointing, under the keys of Megatron's own experts.

        prefix: of this module. replica: this rank among those that hold the same experts.
        """
        where = Where.of(placement, rank, singleton=bool((metadata or {}).get("singleton_local_shards")))
        gated = self.activation.fan == 2
        shards: dict[str, Any] = {}
        for name, weight in self.named_parameters():
            key = f"{prefix}{NAMES[name]}"
            halves = 2 if gated and name.startswith("up") else 1
            shards[f"{prefix}{name}"] = shard_by_expert(key, weight, where, offsets, halves=halves, replica=replica)
        for slot, expert in enumerate(where.expert_S):
            for name in ("up", "down"):
                key = f"{prefix}{NAMES[name]}"
                shards[f"{prefix}{expert}.{name}{EXTRA}"] = nothing_more(
                    key, expert, where, offsets, where.replica(slot, (0, 0, replica))
                )
        return shards

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(EXTRA)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)
