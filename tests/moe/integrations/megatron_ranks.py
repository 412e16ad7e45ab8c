"""What a rank does in the tests of the Megatron-Core integration: build layers and models, compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe import Meters, Recorder, move_experts, settle_prices
from moe.integrations.megatron import CoreMoELayer, PricedRouter, spread_experts
from placement import Placement, Plan
from routing import Balancer, Bip, LeastLoaded, LossFree, NearestCopy
from tests.moe.integrations.megatron_on_cpu import megatron_on_cpu

DIM, EXPERTS = 16, 8
VISITING = LeastLoaded(headroom=1.0)
KINDS: dict[str, dict[str, Any]] = {
    "core": {},
    "core, visits": {"assigner": VISITING},
    "dispatched": {"keep_layer": True},
    "dispatched, visits": {"keep_layer": True, "assigner": VISITING},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "softmax of the chosen, aux and z loss": {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3},
    "softmax before choosing": {"moe_router_pre_softmax": True, "moe_router_topk": 3},
    "sigmoid, groups, scaled": {
        "moe_router_score_function": "sigmoid", "moe_router_num_groups": 4, "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "biases, no gate": {"add_bias_linear": True, "gated_linear_unit": False, "activation_func": F.gelu},
    "shared expert": {"moe_shared_expert_intermediate_size": 8},
    "clamped gate": {"activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0},
    "capacity": {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "probs"},
}  # fmt: skip


@contextmanager
def parallel(experts_over: int) -> Iterator[None]:
    """Megatron's groups, and its freedom from CUDA. Megatron forgets its forty groups and leaves them open, each with
    three threads that never rest: they are closed here, where all ranks are done with them."""
    before = set(dist.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=experts_over, expert_tensor_parallel_size=1)
    try:
        with megatron_on_cpu():
            yield
        dist.barrier()
        for group in dist.distributed_c10d._world.pg_map.keys() - before:
            dist.destroy_process_group(group)
    finally:
        parallel_state.destroy_model_parallel()


def config(dtype: torch.dtype = torch.float64, **more: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": 2, "hidden_size": DIM, "num_attention_heads": 4, "ffn_hidden_size": 24, "moe_ffn_hidden_size": 24,
        "num_moe_experts": EXPERTS, "moe_router_topk": 2, "moe_router_dtype": "fp64", "init_method_std": 0.3,
        "add_bias_linear": False, "gated_linear_unit": True, "activation_func": F.silu, "params_dtype": dtype,
        "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "aux_loss",
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": 1, "use_cpu_initialization": True, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "bias_dropout_fusion": False, "bias_activation_fusion": False,
        "masked_softmax_fusion": False, "gradient_accumulation_fusion": False, "bf16": dtype == torch.bfloat16,
    }  # fmt: skip
    return TransformerConfig(**(options | more))


def layer_of(settings: TransformerConfig, groups: Any = None, *, stock: bool = False, **kind: Any) -> Any:
    """Megatron's own layer, or one of ours, built as a TransformerLayer builds it."""
    spec = get_moe_module_spec(use_te=False, num_experts=settings.num_moe_experts, moe_grouped_gemm=False)
    if not stock:
        spec = spread_experts(spec, pg_collection=groups, **kind)
    torch.manual_seed(0)
    layer = spec(config=settings)
    layer.set_layer_number(1)
    return layer


def weights_of(layer: Any) -> dict[str, Any]:
    """{name: parameter, or its part} of this rank's experts in Megatron's names, and of all else."""
    named = {name: weight for name, weight in layer.named_parameters() if ".experts." not in f".{name}"}
    if isinstance(layer, CoreMoELayer):
        names = {"up": "linear_fc1.weight", "down": "linear_fc2.weight", "up_bias": "linear_fc1.bias"}
        names["down_bias"] = "linear_fc2.bias"
        for name, stack in layer.experts.experts.named_parameters():
            named |= {f"{e} {names[name]}": (stack, slot) for slot, e in enumerate(layer.local_expert_indices)}
    else:
        for expert, module in zip(layer.local_expert_indices, layer.experts.local_experts):
            named |= {f"{expert} {name}": weight for name, weight in module.named_parameters()}
    return named


def tensor_of(weight: Any, what: Callable[[Tensor], Tensor]) -> Tensor:
    return what(weight[0])[weight[1]] if isinstance(weight, tuple) else what(weight)


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    given, wanted = weights_of(source), weights_of(target)
    assert given.keys() == wanted.keys()
    for name, weight in wanted.items():
        tensor_of(weight, lambda t: t.data).copy_(tensor_of(given[name], lambda t: t.data))


def batch(rank: int, dtype: torch.dtype = torch.float64, length: int = 9) -> tuple[Tensor, Tensor]:
    """[s, b, h] and what its output is weighted with; some experts are hot."""
    generator = torch.Generator().manual_seed(20 + rank)
    x, w = (torch.randn(length, 2, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    pull = torch.randn(DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (x + 0.7 * pull).to(dtype).requires_grad_(), w.to(dtype)


def trained(layer: Any, x: Tensor, w: Tensor, **options: Any) -> dict[str, Tensor]:
    """Output and every gradient, by name."""
    x = x.detach().clone().requires_grad_()
    for weight in layer.parameters():
        weight.grad = None
    y, bias = layer(x, **options)
    assert bias is None
    (y * w).sum().backward()
    assert x.grad is not None
    got = {"y": y.detach(), "dx": x.grad}
    return got | {name: tensor_of(weight, lambda t: t.grad).clone() for name, weight in weights_of(layer).items()}


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative difference."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return max(((got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-3)).item() for name in want)


def beside_megatrons_own(dtype: torch.dtype) -> tuple[dict[tuple[str, str], float], list[str]]:
    """-> how far from Megatron's own, and where experts visited."""
    with parallel(2):
        errors, visits = {}, []
        x, w = batch(dist.get_rank(), dtype)
        for name, options in CONFIGS.items():
            settings = config(dtype, **options)
            stock = layer_of(settings, stock=True)
            want = trained(stock, x, w)
            for kind, policy in KINDS.items():
                ours = layer_of(settings, **policy)
                copy_weights(stock, ours)
                errors[name, kind] = apart(trained(ours, x, w), want)
                if policy.get("keep_layer") and ours.token_dispatcher.loans:
                    visits.append(name)
        return errors, visits


def alone() -> ProcessGroupCollection:
    """Groups of this rank and nobody else."""
    own, _ = dist.new_subgroups(group_size=1)
    groups = ProcessGroupCollection()
    for name in ("ep", "tp", "cp", "expt_tp", "expt_dp", "tp_ep", "tp_cp", "tp_dp_cp"):
        setattr(groups, name, own)
    return groups


def placed_anyhow() -> dict[str, float]:
    """Five experts on two ranks, against a layer that is told of no other rank."""
    copies = Placement(expert_RS=[[0, 1, 2, 3], [3, 4, 0, -1]])
    crowded = Placement(expert_RS=[[-1, -1, -1, -1, -1], [4, 3, 0, 1, 2]])
    ways: dict[str, dict[str, Any]] = {
        "in order": {},
        "visits": {"assigner": VISITING},
        "copies": {"placement": copies, "assigner": NearestCopy()},
        "copies and visits": {"placement": copies, "assigner": VISITING},
        "a rank without experts": {"placement": crowded, "assigner": VISITING},
    }
    with parallel(2):
        settings, rank, errors = config(num_moe_experts=5), dist.get_rank(), {}
        single = layer_of(settings, alone())
        own, other = (trained(single, *batch(r)) for r in (rank, 1 - rank))
        for way, policy in ways.items():
            got = trained(layer_of(settings, **policy), *batch(rank))
            summed = {name: own[name] + other[name] if name[0].isdigit() else own[name] for name in got}
            errors[way] = apart(got, summed)
        return errors


def recomputed() -> float:
    with parallel(2):
        errors = []
        for policy in (KINDS["core, visits"] | {"balancer": Bip(rounds=2)}, KINDS["dispatched, visits"]):
            plain, again = (
                layer_of(config(recompute_granularity=granularity, recompute_modules=["moe"]), **policy)
                for granularity in (None, "selective")
            )
            x, w = batch(dist.get_rank())
            errors.append(apart(trained(again, x, w), trained(plain, x, w)))
            prices = getattr(again.experts, "router", None)
            if prices is not None:
                assert prices.stats["tokens"] == x.shape[0] * x.shape[1]  # counted once
        return max(errors)


def padded() -> dict[str, float]:
    """What padding holds changes nothing, and is not counted; what comes of the other tokens is as without it."""
    with parallel(2):
        x, w = batch(dist.get_rank())
        mask = torch.zeros(2, 9, dtype=torch.bool)  # [b, s], True for padding
        mask[1, 6:] = True
        hole = mask.T[..., None].expand_as(x)
        x, w = x.detach().masked_fill(hole, 7.0), w.masked_fill(hole, 0.0)
        settings = config(moe_router_load_balancing_type="none")
        errors = {}
        for kind in ({"balancer": LossFree(step=0.1)}, {"balancer": LossFree(step=0.1), "keep_layer": True}):
            layer = layer_of(settings, **kind)
            want = trained(layer, x, w)
            got = trained(layer, x, w, padding_mask=mask)
            prices = layer.router.prices if isinstance(layer.router, PricedRouter) else layer.experts.router
            assert prices.stats["tokens"] == 18 + 15
            keep = ~hole
            errors[str(kind)] = apart(
                got | {"y": got["y"][keep], "dx": got["dx"][keep]},
                want | {"y": want["y"][keep], "dx": want["dx"][keep]},
            )
        return errors


def priced(balancer: Balancer, steps: int = 6) -> tuple[float, list[Tensor], list[float]]:
    """Two micro-batches a step, prices settled over Megatron's group: in our layer, in Megatron's own with our router,
    and in a layer that is told of no other rank and sees everybody's tokens. -> how far apart, prices, imbalance"""
    with parallel(2):
        rank, settings = dist.get_rank(), config(moe_router_load_balancing_type="none")
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
        submodules = replace(spec.submodules, router=partial(PricedRouter, balancer=balancer))
        torch.manual_seed(0)
        megatrons = replace(spec, submodules=submodules)(config=settings)
        ours, single = layer_of(settings, balancer=balancer), layer_of(settings, alone(), balancer=balancer)
        dispatched = layer_of(settings, balancer=balancer, keep_layer=True)
        copy_weights(ours, megatrons)
        copy_weights(ours, dispatched)
        vio: list[float] = []
        differences = []
        meters = Meters(ours)
        for step in range(steps):
            x, _ = batch(rank, length=16)
            y = [layer(x)[0] for layer in (ours, megatrons, dispatched)]
            differences += [(y[0] - each).abs().max().item() for each in y[1:]]
            for r in range(2):
                single(batch(r, length=16)[0])
            for layer in (ours, megatrons, dispatched):
                settle_prices(layer, group)
            settle_prices(single, single.ep_group)
            vio.append(meters.read(step)["mean"]["max_vio"])
        prices = [
            ours.experts.router.price_E, megatrons.router.prices.price_E, dispatched.router.prices.price_E,
            single.experts.router.price_E,
        ]  # fmt: skip
        return max(differences), prices, vio


def known_to_tools() -> dict[str, Any]:
    """Recorder, move_experts: Megatron's layer is a layer of evenmoe's."""
    with parallel(2):
        layer = layer_of(config())
        x, w = batch(dist.get_rank())
        with Recorder(layer) as recorder:
            before = trained(layer, x, w)
            recorder.end_window()
        plan = Plan(placement_L=(Placement(expert_RS=[[0, 2, 4, 6], [7, 5, 3, 1]]),))
        for weight in layer.parameters():
            weight.grad = None
        moved = move_experts(layer, plan)
        after = trained(layer, x, w)
        marks = all(weight.allreduce is False for weight in layer.experts.parameters())
        return {
            "load": recorder.trace().load_WLE.sum(), "moves": moved.moves, "marks": marks,
            "ids": layer.local_expert_indices, "y": (before["y"] - after["y"]).abs().max().item(),
        }  # fmt: skip


def model_of(settings: TransformerConfig, **kind: Any) -> GPTModel:
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    if kind:
        spec = spread_experts(spec, **kind)
    torch.manual_seed(0)
    model = GPTModel(settings, spec, vocab_size=32, max_sequence_length=16, position_embedding_type="learned_absolute")
    return model.double()  # type: ignore[no-any-return]


def reduced(settings: TransformerConfig, model: GPTModel, averaged: bool) -> dict[str, Tensor]:
    """Gradients of two micro-batches after Megatron's DDP and finalize_model_grads."""
    options = DistributedDataParallelConfig(overlap_grad_reduce=False, average_in_collective=averaged)
    ddp = DistributedDataParallel(settings, options, model)
    ddp.zero_grad_buffer()
    for number in range(2):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + number)
        token = torch.randint(0, 32, (2, 8), generator=generator)
        mask = torch.ones(8, 8).tril().lt(0.5)[None, None]
        ddp(token, torch.arange(8).expand(2, 8), mask, labels=token.roll(-1, 1)).mean().backward()
    finalize_model_grads([ddp])
    grads = {}
    for number, layer in enumerate(model.decoder.layers):
        assert layer.is_moe_layer
        for name, weight in weights_of(layer.mlp).items():
            grads[f"{number} {name}"] = tensor_of(weight, lambda t: t.main_grad).clone()
    for name, weight in model.named_parameters():
        if ".mlp." not in name:
            grads[name] = weight.main_grad.clone()
    return grads


def in_a_model() -> dict[str, float]:
    """Two expert-parallel groups, each of two ranks: gradients as those of Megatron's own layers."""
    with parallel(2):
        settings, errors = config(), {}
        for averaged in (False, True):
            stock = model_of(settings)
            want = reduced(settings, stock, averaged)
            for name, kind in KINDS.items():
                ours = model_of(settings, **(kind or {"assigner": LeastLoaded(headroom=9.0)}))
                ours.load_state_dict({n: t for n, t in stock.state_dict().items() if ".mlp." not in n}, strict=False)
                for theirs, own in zip(stock.decoder.layers, ours.decoder.layers):
                    copy_weights(theirs.mlp, own.mlp)
                errors[f"{name}, averaged {averaged}"] = apart(reduced(settings, ours, averaged), want)
        return errors


def saved(folder: str, experts_over: int, kind: dict[str, Any], singleton: bool, settled: bool = False) -> None:
    """A model whose weights depend on the seed alone, into a distributed checkpoint."""
    with parallel(experts_over):
        model = model_of(config(), **kind)
        if settled:
            for number, layer in enumerate(model.decoder.layers):
                layer.mlp.experts.router.price_E.copy_(torch.arange(EXPERTS) + 10.0 * number)
        if dist.get_rank() == 0:
            Path(folder).mkdir()
        dist.barrier()
        dist_checkpointing.save(model.sharded_state_dict(metadata={"singleton_local_shards": singleton}), folder)


def loaded(folder: str, experts_over: int, kind: dict[str, Any], singleton: bool) -> tuple[dict[str, Tensor], Any]:
    """-> every expert of this rank, by its names; and prices"""
    with parallel(experts_over):
        model = model_of(config(), **kind)
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(torch.nan)
        shards = model.sharded_state_dict(metadata={"singleton_local_shards": singleton})
        model.load_state_dict(dist_checkpointing.load(shards, folder))
        mlps = [layer.mlp for layer in model.decoder.layers]
        found = {
            f"{number} {name}": tensor_of(weight, lambda t: t.detach()).clone()
            for number, mlp in enumerate(mlps)
            for name, weight in weights_of(mlp).items()
        }
        assert not any(weight.isnan().any() for weight in model.parameters())
        return found, [mlp.experts.router.price_E for mlp in mlps if isinstance(mlp, CoreMoELayer)]
