"""The layer on 1, 2 and 4 ranks is the literal loop on one: outputs and every gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe import GELU, MoEConfig, ReLU2, SwiGLU, World
from placement import Placement
from routing import Assigner, AtHome, BreakEven, LeastLoaded, NearestCopy, Sigmoid, TopK, Waterfill, Weigh
from tests.world import Seen, against_reference

LEAST = LeastLoaded(headroom=1.0)
Worlds = Callable[[int], World]


def config(num_experts: int = 8, top_k: int = 2, assigner: Assigner = LEAST, **more: Any) -> MoEConfig:
    return MoEConfig(dim=6, hidden=5, num_experts=num_experts, top_k=top_k, assigner=assigner, **more)


def exact(answers: Sequence[Seen], tolerance: float = 1e-10) -> Seen:
    for rank, seen in enumerate(answers):
        assert seen.error <= tolerance, f"rank {rank}: {seen.worst} is off by {seen.error:.3g}"
        assert seen.forwards == 1, "observers hear of a forward once"
    assert len({tuple(seen.load_R) for seen in answers}) == 1, "ranks disagree on the plan"
    return answers[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("assigner", [AtHome(), LEAST], ids=["home", "least"])
@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (7, 3), (8, 1), (5, 5), (3, 2)])
def test_any_number_of_experts_and_choices_is_exact(
    world: Worlds, ranks: int, assigner: Assigner, num_experts: int, top_k: int
) -> None:
    seen = exact(world(ranks).run(against_reference, config(num_experts, top_k, assigner), (16,) * ranks))
    assert sum(seen.load_R) == 16 * ranks * top_k


@pytest.mark.parametrize("tokens_R", [(16, 0, 16, 3), (0, 0, 0, 1), (0, 0, 0, 0), (1, 2, 3, 4), (64, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("assigner", [AtHome(), LEAST], ids=["home", "least"])
def test_empty_and_ragged_batches_are_exact(world: Worlds, tokens_R: tuple[int, ...], assigner: Assigner) -> None:
    exact(world(4).run(against_reference, config(assigner=assigner), tokens_R))


def test_an_expert_split_over_every_rank_is_exact(world: Worlds) -> None:
    seen = exact(world(4).run(_skewed, config(top_k=1), (32,) * 4))
    assert seen.most_ranks >= 3
    assert seen.loans >= 2
    assert max(seen.load_R) <= 32 + LEAST.min_chunk


def _skewed(settings: MoEConfig, tokens_R: Sequence[int]) -> Seen:
    return against_reference(settings, tokens_R, skew=20.0)


@pytest.mark.parametrize("activation", [SwiGLU(), GELU(), ReLU2()], ids=["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_every_kind_of_expert_is_exact(world: Worlds, activation: Any, bias: bool) -> None:
    settings = config(top_k=1, activation=activation, bias=bias, shared_hidden=4)
    seen = exact(world(2).run(_skewed, settings, (12, 20)))
    assert seen.loans > 0


def test_every_kind_of_router_is_exact(world: Worlds) -> None:
    for more in (
        {"score": Sigmoid(), "weigh": Weigh(normalize=True, scale=2.5)},
        {"select": TopK(groups=4, keep=2, worth="top2sum")},
    ):
        exact(world(2).run(against_reference, config(**more), (12, 20)))


@pytest.mark.parametrize("tokens_R", [(5, 0, 0, 0), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("num_experts", [2, 3])
def test_a_rank_with_no_expert_and_no_visitor_takes_part_in_backward(
    world: Worlds, num_experts: int, tokens_R: tuple[int, ...]
) -> None:
    """Experts visit others meanwhile: their gradients must not wait for a rank that left them out of its graph."""
    settings = config(num_experts, 1, LeastLoaded(), bias=True)
    exact(world(4).run(against_reference, settings, tokens_R))


def test_a_rank_without_experts_takes_part_in_tying_copies(world: Worlds) -> None:
    for assigner in (AtHome(), LEAST):
        exact(world(3).run(_placed_on_two, config(2, 1, assigner)))


def _placed_on_two(settings: MoEConfig) -> Seen:
    placement = Placement(expert_RS=np.array([[0, 1], [0, -1], [-1, -1]]))
    return against_reference(settings, (4, 3, 0), placement=placement)


def test_the_comparison_sees_a_gradient_that_is_no_number(world: Worlds) -> None:
    for seen in world(1).run(_with_nan):
        assert seen.error == float("inf")
        assert seen.worst in ("dx", "router.weight")


def _with_nan() -> Seen:
    from moe.visit import _Visit

    real = _Visit.backward

    def poisoned(ctx: Any, dy_TD: torch.Tensor) -> Any:
        none, dx_TD, dweight_N, *grads = real(ctx, dy_TD)
        assert dweight_N is not None
        return none, dx_TD, dweight_N * float("nan"), *grads

    _Visit.backward = staticmethod(poisoned)  # type: ignore[assignment,method-assign]
    try:
        return against_reference(config(), (8,))
    finally:
        _Visit.backward = staticmethod(real)  # type: ignore[method-assign]


def test_padding_is_neither_routed_nor_counted(world: Worlds) -> None:
    answers = world(4).run(_padded, config(shared_hidden=4), (16, 0, 9, 16))
    routed = sum(exact(answers).load_R)
    assert routed < 41 * 2


def _padded(settings: MoEConfig, tokens_R: Sequence[int]) -> Seen:
    return against_reference(settings, tokens_R, padded=True)


COPIES = Placement(expert_RS=np.array([[0, 1, 2, 3], [4, 5, 0, 1], [6, 0, -1, -1], [7, 3, 6, -1]]))
SPLITS = {
    "home": AtHome(),
    "least": LEAST,
    "nearest": NearestCopy(node_R=(0, 0, 1, 1)),
    "waterfill": Waterfill(node_R=(0, 0, 1, 1)),
}


@pytest.mark.parametrize("assigner", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("skew", [1.0, 20.0])
def test_copies_compute_and_get_the_whole_gradient(world: Worlds, assigner: Assigner, skew: float) -> None:
    """Copies that start equal stay equal only if each gets the gradient of all."""
    exact(world(4).run(_placed, config(assigner=assigner, bias=True), skew))


def _placed(settings: MoEConfig, skew: float) -> Seen:
    return against_reference(settings, (16, 4, 0, 16), skew=skew, placement=COPIES)


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_recomputed_layers_are_exact(world: Worlds, recompute: str) -> None:
    seen = exact(world(4).run(_recomputed, config(bias=True), recompute))
    assert seen.loans > 0


def _recomputed(settings: MoEConfig, recompute: str) -> Seen:
    return against_reference(settings, (16, 0, 9, 16), skew=5.0, recompute=recompute)


def test_groups_need_not_start_at_rank_0(world: Worlds) -> None:
    """Two groups, of even and of odd ranks; and one of three ranks without rank 0."""
    exact(world(4).run(_in_strided_groups, config()))
    exact(world(4).run(_in_the_last_three, config())[1:])


def _in_strided_groups(settings: MoEConfig) -> Seen:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    parity = dist.get_rank() % 2
    return against_reference(settings, (16, 5), group=groups[parity], seed=1 + parity, skew=5.0)._replace(load_R=[])


def _in_the_last_three(settings: MoEConfig) -> Seen | None:
    group = dist.new_group([1, 2, 3])
    return against_reference(settings, (16, 0, 5), group=group, skew=5.0) if dist.get_rank() else None


def test_a_dimension_of_a_device_mesh_is_a_group(world: Worlds) -> None:
    exact(world(4).run(_on_a_mesh, config()))


def _on_a_mesh(settings: MoEConfig) -> Seen:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    return against_reference(settings, (16, 5), group=mesh["ep"], skew=5.0)


def test_a_plan_that_does_not_pay_is_not_made(world: Worlds) -> None:
    costly = LeastLoaded(headroom=1.0, worth=BreakEven(rows=1e9))
    seen = exact(world(2).run(_skewed, config(assigner=costly), (16, 16)))
    assert seen.loans == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lending_costs_no_more_precision_than_staying(world: Worlds, dtype: torch.dtype) -> None:
    """In bf16, an expert that visited others is within twice the plain path's own error."""
    home = world(4).run(_in_type, config(assigner=AtHome(), bias=True), dtype)
    least = world(4).run(_in_type, config(assigner=LEAST, bias=True), dtype)
    assert least[0].loans > 0
    for plain, lent in zip(home, least):
        assert lent.error <= 2 * max(seen.error for seen in home) + 1e-12, (plain, lent)


def _in_type(settings: MoEConfig, dtype: torch.dtype) -> Seen:
    """The same weights and tokens in a lower precision, compared with float64."""
    return against_reference(settings, (16, 0, 9, 16), skew=5.0, dtype=dtype)
