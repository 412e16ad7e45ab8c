"""Checkpoints of a spread model, in the host's own format: a rank reads what it owns, and writes what it homes.

Which keys a family uses on disk, and how they become its stacked tensors, transformers knows (its conversion mapping).
So the host's experts module is put back for a moment, with the stacks of this rank, and transformers converts those:
reading a stack of a few experts, or writing one, is to it the same as of all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from moe.comm import Group, Peers, exchange, gather_objects
from moe.integrations.huggingface.layer import HostMoE, parallelize_experts
from placement import Placement, Plan
from routing import Assigner, AtHome, Balancer

INDEX, SINGLE, PRICES = "model.safetensors.index.json", "model.safetensors", "evenmoe_prices.safetensors"
NUMBER = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


@dataclass
class Tally:
    """What `load_pretrained` read: bytes of tensors, of all that the checkpoint holds."""

    read: int = 0
    held: int = 0


@dataclass(frozen=True, eq=False)
class _Lazy:
    """A tensor of a file, or some rows of it, read when transformers asks for it."""

    rows: Any
    tally: Tally
    expert_ids: Sequence[int] | None = field(default=None)

    def __getitem__(self, _: Any) -> Tensor:
        if self.expert_ids is None:
            tensor: Tensor = self.rows[...]
        else:
            some = [self.rows[expert : expert + 1] for expert in self.expert_ids]
            tensor = torch.cat(some) if some else self.rows[:0]
        self.tally.read += tensor.nbytes
        return tensor


def load_pretrained(
    folder: str | Path,
    group: Group = None,
    *,
    assigner: Assigner = AtHome(),
    balancer: Balancer | None = None,
    placement: Plan | Placement | None = None,
    dtype: torch.dtype | None = None,
    auto: Any = AutoModelForCausalLM,
    tally: Tally | None = None,
) -> Any:
    """`auto.from_pretrained(folder)` and `parallelize_experts`, where a rank reads only the experts that live on it.

    folder: of safetensors files. dtype: the checkpoint's own if None. tally: is told how many bytes were read.
    """
    folder, tally = Path(folder), Tally() if tally is None else tally
    tally.held += sum((folder / name).stat().st_size for name in _files(folder))
    config = AutoConfig.from_pretrained(folder)
    with _parameters_on_meta():
        model = auto.from_config(config, dtype=dtype or config.dtype or torch.float32)
    parallelize_experts(model, group, assigner=assigner, balancer=balancer, placement=placement)
    mapping = get_model_conversion_mapping(model)
    with ExitStack() as files:
        opened = [files.enter_context(safe_open(folder / name, "pt")) for name in _files(folder)]
        with _as_the_host_knows_them(model) as expert_ids:
            state = _owned(model, opened, expert_ids, mapping, tally)
            plan = model._get_dtype_plan(model.dtype)
            load = LoadStateDictConfig(dtype=model.dtype, dtype_plan=plan, weight_mapping=mapping)
            info, _ = convert_and_load_state_dict_in_model(model, state, load)
    if info.mismatched_keys or info.conversion_errors:
        raise ValueError(f"{folder} does not fit its config: {[*info.mismatched_keys, *info.conversion_errors]}")
    model.tie_weights()
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ValueError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, the first {missing[0]}")
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    _load_prices(model, folder)
    return model.eval()


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Write a model whose experts are spread as the host would have: `from_pretrained` reads it on any number of ranks.

    Every rank writes the experts it homes, rank 0 all else. folder: one that all ranks see. Call it on every rank. The
    prices of a balancer, which the host has no place for, go to a file of their own that `load_pretrained` reads.
    """
    folder, layers = Path(folder), _layers(model)
    peers = next(iter(layers.values())).peers
    folder.mkdir(parents=True, exist_ok=True)
    with _as_the_host_knows_them(model):
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    shards: list[dict[str, Tensor]] = []
    own: dict[str, Tensor] = {}
    for name, layer in layers.items():
        stacks = {key: state.pop(key) for key in [f"{name}.{leaf}" for leaf in layer.experts.names.values()]}
        if _one_key_for_all(model, stacks):
            whole = {key: _whole(stack, layer) for key, stack in stacks.items()}
            if peers.rank == 0:
                shards.append(revert_weight_conversion(model, whole))
        else:
            own |= _by_expert(model, stacks, layer)
    if peers.rank == 0:
        shards.append(revert_weight_conversion(model, state))
        _save_prices(layers, folder)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    _write(folder, [*shards, own] if own else shards, peers)


def _write(folder: Path, shards: Sequence[Mapping[str, Tensor]], peers: Peers) -> None:
    """Each shard to a file, numbered over all ranks, and the index of them all."""
    held = gather_objects([{key: tensor.nbytes for key, tensor in shard.items()} for shard in shards], peers)
    total, first = sum(map(len, held)), sum(map(len, held[: peers.rank]))
    names = [f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]
    for name, shard in zip(names[first:], shards):
        alone = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in shard.items()}
        save_file(alone, folder / name, metadata={"format": "pt"})
    if peers.rank == 0:
        flat = [shard for shards in held for shard in shards]
        index = {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in flat)},
            "weight_map": {key: name for name, shard in zip(names, flat) for key in shard},
        }
        (folder / SINGLE).unlink(missing_ok=True)
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    gather_objects(None, peers)  # nobody reads before everybody has written


def _layers(model: nn.Module) -> dict[str, Any]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HostMoE)}
    if not layers:
        raise ValueError("the experts of this model are not spread; use its own save_pretrained")
    return layers


@contextmanager
def _as_the_host_knows_them(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Within it, the host's experts modules are in place, with this rank's stacks by ascending expert. Stacks that were
    on the meta device may be replaced by real ones. -> the experts in each, by name"""
    layers = _layers(model)
    for name, layer in layers.items():
        host, ids = layer.experts.host.module, layer.experts.expert_ids
        order = sorted(range(len(ids)), key=ids.__getitem__)
        for leaf, weight in layer.experts.named_parameters():
            in_order = weight if order == list(range(len(ids))) else nn.Parameter(weight.detach()[order])
            host.register_parameter(leaf, in_order)
        model.set_submodule(name, host)
    try:
        yield {name: sorted(layer.experts.expert_ids) for name, layer in layers.items()}
    finally:
        for name, layer in layers.items():
            experts = layer.experts
            rank_of = {expert: place for place, expert in enumerate(sorted(experts.expert_ids))}
            for leaf, weight in list(experts.named_parameters()):
                given = experts.host.module._parameters.pop(leaf)
                if weight.is_meta and (not given.is_meta or not len(given)):
                    real = torch.empty_like(given, device="cpu") if given.is_meta else given.detach()
                    slots = real[[rank_of[expert] for expert in experts.expert_ids]]
                    experts.register_parameter(leaf, nn.Parameter(slots, requires_grad=weight.requires_grad))
            model.set_submodule(name, layer)


def _files(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    raise ValueError(f"{folder} has neither {INDEX} nor {SINGLE}; load_pretrained reads a folder of safetensors files")


def _owned(
    model: Any, opened: Sequence[Any], expert_ids: Mapping[str, Sequence[int]], mapping: Sequence[Any], tally: Tally
) -> dict[str, _Lazy]:
    """Every key of the checkpoint that this rank needs, none of them read yet."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, state = model.state_dict(), {}
    for file in opened:
        for key in file.keys():  # noqa: SIM118  # not a dict
            rows = file.get_slice(key)
            target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            ids, number = expert_ids.get(target.rpartition(".")[0]), NUMBER.search(key)
            if ids is None or (number is not None and int(number[0]) in ids):
                state[key] = _Lazy(rows, tally)
            elif number is None:
                state[key] = _Lazy(rows, tally, ids)
    return state


def _one_key_for_all(model: Any, stacks: Mapping[str, Tensor]) -> bool:
    """Does this family keep all experts of a layer in one tensor on disk?"""
    probe = {key: stack.new_empty(1, *stack.shape[1:], device="meta") for key, stack in stacks.items()}
    return any(NUMBER.search(key) is None for key in revert_weight_conversion(model, probe))


def _by_expert(model: Any, stacks: Mapping[str, Tensor], layer: HostMoE) -> dict[str, Tensor]:
    """The tensors of the experts that this rank homes, each under its number."""
    own: dict[str, Tensor] = {}
    for place, expert in enumerate(sorted(layer.experts.expert_ids)):
        if layer.placement.home_E[expert] == layer.peers.rank:
            one = {key: stack[place : place + 1] for key, stack in stacks.items()}
            own |= {NUMBER.sub(str(expert), key): part for key, part in revert_weight_conversion(model, one).items()}
    return own


@torch.no_grad()
def _whole(stack: Tensor, layer: HostMoE) -> Tensor:
    """A stack of all experts on rank 0, of none on the others."""
    home_E, peers, ids = layer.placement.home_E.tolist(), layer.peers, sorted(layer.experts.expert_ids)
    homed = [place for place, expert in enumerate(ids) if home_E[expert] == peers.rank]
    send_R = [len(homed) if rank == 0 else 0 for rank in range(peers.size)]
    recv_R = [home_E.count(rank) if peers.rank == 0 else 0 for rank in range(peers.size)]
    by_rank = exchange(stack.detach()[homed], send_R, recv_R, peers)
    if peers.rank != 0:
        return by_rank
    come = sorted(range(len(home_E)), key=lambda expert: (home_E[expert], expert))
    return by_rank[sorted(range(len(come)), key=come.__getitem__)]


def _save_prices(layers: Mapping[str, Any], folder: Path) -> None:
    prices = {f"{name}.price_E": layer.router.price_E for name, layer in layers.items()}
    (folder / PRICES).unlink(missing_ok=True)
    if any(price_E.any() for price_E in prices.values()):
        save_file({name: price_E.cpu().clone() for name, price_E in prices.items()}, folder / PRICES)


def _load_prices(model: nn.Module, folder: Path) -> None:
    if (folder / PRICES).exists():
        with safe_open(folder / PRICES, "pt") as file:
            for name, layer in _layers(model).items():
                layer.router.price_E.copy_(file.get_tensor(f"{name}.price_E"))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made within it have parameters without memory; their buffers are as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        register(module, name, weight)
        if weight is not None:
            module._parameters[name] = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
