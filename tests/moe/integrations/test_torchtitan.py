"""torchtitan's own MoE, sharded by its own plan over EP 2 x FSDP 2, is the MoE of one process with evenmoe inside.

torchtitan needs triton even on a CPU, and half a gigabyte of others: it is not part of evenmoe[dev].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if not find_spec("torchtitan") or not find_spec("triton"):
    reason = "torchtitan or triton is not installed; pip install 'evenmoe[torchtitan]'"
    pytest.skip(reason, allow_module_level=True)

from moe import World
from moe.comm.fsdp import shard_on_two_meshes
from moe.comm.mesh import here
from tests.moe.integrations.sharded import full
from tests.world import run

# torchtitan asks for autocast in fp32, which a CPU does not have and does not need.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
Worlds = Callable[[int], World]
RANKS, EXPERTS, WIDTH, DIM, HIDDEN = 4, 8, 2, 16, 32
OURS = "moe.integrations.torchtitan.overrides"


def titan() -> None:
    """Import it, once, past the warnings of its own imports and of those of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchtitan.distributed.parallel_dims
        import torchtitan.models.common.config_utils
        import torchtitan.models.common.moe_sharding  # noqa: F401


def settings(ep: int, override: str | tuple[str, dict[str, Any]] | None) -> Any:
    titan()
    from torchtitan.config import OverrideConfig
    from torchtitan.config.override import apply_overrides
    from torchtitan.models.common.config_utils import (
        make_moe_config,
        make_routed_experts_config,
        make_router_config,
    )
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config
    from torchtitan.models.deepseek_v3.sharding import _GROUPED_EXPERTS_PARAM_LAYOUT

    config = make_moe_config(
        num_experts=EXPERTS,
        router=make_router_config(
            dim=DIM, num_experts=EXPERTS, top_k=WIDTH, score_func="softmax", gate_param_init={"weight": nn.init.normal_}
        ),
        routed_experts=make_routed_experts_config(
            dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS, top_k=WIDTH, param_init={}, comm_backend="standard"
        ),
    )
    set_moe_sharding_config(
        config, enable_ep=ep > 1, enable_sp=False, expert_param_layout=_GROUPED_EXPERTS_PARAM_LAYOUT
    )
    if override is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = apply_overrides(OverrideConfig(imports=[override]), config)
        assert len(said) == 1
    return config


def build(ep: int, override: Any) -> Any:
    """Its MoE with weights from a seed; above EP 1 parallelized as torchtitan does it, then under FSDP2."""
    layer = settings(ep, override).build()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.2)
        layer.tokens_per_expert_E.zero_()
        layer.expert_bias_E.zero_()
    if ep == 1:
        return layer
    from torchtitan.distributed import parallel_dims

    parallel_dims.device_type = "cpu"  # it takes every machine for one with CUDA
    dims = parallel_dims.ParallelDims(
        dp_replicate=1, dp_shard=RANKS, cp=1, tp=1, pp=1, ep=ep, world_size=RANKS, spmd_backend="partial_dtensor"
    )
    dims.build_mesh()
    layer.parallelize(dims)
    experts = list(layer.routed_experts.inner_experts.parameters())
    shard_on_two_meshes(layer, experts, dims.get_mesh("fsdp"), dims.get_mesh("efsdp"), {})
    return layer


def batch(rank: int) -> Tensor:
    """Skewed, so that experts must visit."""
    pull = torch.randn(DIM, generator=torch.Generator().manual_seed(9))
    x_BLD: Tensor = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(rank)) + 2.0 * pull
    return x_BLD


def exact(inner: Any, x_RD: Tensor, count_E: Tensor) -> Tensor:
    """torchtitan's experts as a loop, in the type of x."""
    outs = []
    for expert, row_RD in enumerate(x_RD.split(count_E.tolist())):
        w1, w2, w3 = (here(weight)[expert] for weight in (inner.w1_EFD, inner.w2_EDF, inner.w3_EFD))
        outs.append((nn.functional.silu(row_RD @ w1.T) * (row_RD @ w3.T)) @ w2.T)
    return torch.cat(outs)


def alone(loop: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    layer = build(1, None)
    if loop:
        inner = layer.routed_experts.inner_experts
        inner.forward = partial(exact, inner)
    outs = [layer(batch(rank)) for rank in range(RANKS)]
    (sum(out.square().mean() for out in outs) / RANKS).backward()  # type: ignore[union-attr]
    return [out.detach() for out in outs], {name: weight.grad for name, weight in layer.named_parameters()}


def together(ep: int, override: Any, kind: str = "none", loop: bool = False) -> tuple[Tensor, dict[str, Tensor], int]:
    layer = build(ep, override)
    if loop:
        inner = layer.routed_experts.inner_experts
        inner.forward = partial(exact, inner)
    y = run(kind, layer, batch(dist.get_rank()).requires_grad_())
    y.square().mean().backward()
    grads = {name: full(weight.grad) for name, weight in layer.named_parameters()}
    return y.detach(), grads, len(getattr(layer.routed_experts, "loans", ()))


def close(answers: list[Any], want: tuple[list[Tensor], dict[str, Tensor]], tolerance: float) -> None:
    for rank, (y, grads, _) in enumerate(answers):
        assert (y - want[0][rank]).abs().max() < tolerance * want[0][rank].abs().max()
        assert grads.keys() == want[1].keys()
        for name, grad in grads.items():
            assert (grad - want[1][name]).abs().max() < tolerance * want[1][name].abs().max(), name


@pytest.mark.parametrize("kind", ["none", "non-reentrant", "selective"])
@pytest.mark.parametrize("ep", [2, 4])
def test_experts_that_visit_are_those_of_one_process(world: Worlds, ep: int, kind: str) -> None:
    answers = world(RANKS).run(together, ep, (f"{OURS}.least_loaded", {"headroom": 1.0}), kind)
    close(answers, alone(loop=True), 1e-5)
    assert answers[0][2] > 0


@pytest.mark.parametrize("ep", [2, 4])
def test_the_dispatcher_is_exact_under_torchtitans_names(world: Worlds, ep: int) -> None:
    close(world(RANKS).run(together, ep, f"{OURS}.at_home", "none", True), alone(loop=True), 1e-5)


def test_the_dispatcher_with_torchtitans_experts_is_torchtitan(world: Worlds) -> None:
    """They compute in bf16, so no better than that."""
    close(world(RANKS).run(together, 2, f"{OURS}.at_home"), alone(loop=False), 2e-2)


def test_one_process_is_left_to_torchtitan() -> None:
    for override in (f"{OURS}.at_home", f"{OURS}.least_loaded"):
        layer, its = build(1, override), build(1, None)
        assert torch.equal(layer(batch(0)), its(batch(0)))


def test_experts_that_compute_their_own_way_are_refused() -> None:
    titan()
    from torchtitan.config import derive
    from torchtitan.models.common.moe import GroupedExperts

    class Others(GroupedExperts):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):  # type: ignore[misc]
            pass

    config = settings(1, f"{OURS}.least_loaded").routed_experts
    config.inner_experts = derive(config.inner_experts, Others.Config)
    with pytest.raises(ValueError, match=r"Others, which compute in a way of their own.*at_home"):
        config.build()
