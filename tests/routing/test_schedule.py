"""Sparsify: k by step and layer; a router follows its settled steps, also when they come from a checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing import Balancer, MaskRatio, Router, Sparsify, TopK
from routing.expert_choice import ExpertChoice
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
STAGES = Sparsify(stages=((0, (8, 4, 2)), (2, (4, 4, 1)), (3, 1)))


@LAW
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.lists(st.integers(1, 50), min_size=5, max_size=5),
    st.integers(0, 400),
)
def test_k_is_that_of_the_last_stage_that_has_started(ks: list[int], lengths: list[int], step: int) -> None:
    starts = [0]
    for length in lengths[: len(ks) - 1]:
        starts.append(starts[-1] + length)
    schedule = Sparsify(stages=tuple(zip(starts, ks)))
    started = [k for start, k in zip(starts, ks) if start <= step]
    assert schedule(step, 0) == started[-1]
    assert schedule.of_layer(7) == tuple(ks)


def test_each_layer_has_its_own_k_until_all_share_one() -> None:
    assert [[STAGES(step, layer) for layer in range(3)] for step in (0, 1, 2, 3, 99)] == [
        [8, 4, 2], [8, 4, 2], [4, 4, 1], [1, 1, 1], [1, 1, 1],
    ]  # fmt: skip
    assert STAGES.of_layer(0) == (8, 4, 1)


@dataclass(frozen=True, kw_only=True)
class Noting(Balancer):
    """Notes the k it is asked to balance for."""

    heard: list[tuple[str, int]] = field(default_factory=list)

    def check(self, num_experts: int, top_k: int) -> None:
        self.heard.append(("check", top_k))

    def quote(
        self, score_TE: Tensor, price_E: Tensor, top_k: int, *, valid_T: Tensor | None, settled: Tensor
    ) -> Tensor:
        self.heard.append(("quote", top_k))
        return price_E

    def settle(self, price_E: Tensor, stats: Mapping[str, Tensor], top_k: int, *, settled: Tensor) -> Tensor:
        self.heard.append(("settle", top_k))
        return price_E


def steps(router: Router, count: int) -> list[int]:
    """k of each of the next steps, by its rows and by what its choice says."""
    seen = []
    for _ in range(count):
        choice = router(torch.randn(5, 4))
        router.observe(choice)
        assert len(choice.expert_N) == 5 * choice.k
        seen.append(choice.k)
        router.settle()
    return seen


def test_a_router_takes_the_k_of_its_step_and_settles_it_by_the_same() -> None:
    balancer = Noting()
    router = Router(4, 8, STAGES, layer=0, balancer=balancer)
    assert [k for what, k in balancer.heard if what == "check"] == [8, 4, 1], "every stage is checked beforehand"
    balancer.heard.clear()
    assert steps(router, 5) == [8, 8, 4, 1, 1]
    assert balancer.heard == [(what, k) for k in (8, 8, 4, 1, 1) for what in ("quote", "settle")]


def test_forwards_and_micro_batches_are_no_steps() -> None:
    router = Router(4, 8, STAGES, layer=0)
    for _ in range(5):
        router.observe(router(torch.randn(3, 4)))
    assert router.step == 0
    assert router.top_k == 8


@pytest.mark.parametrize("how", ["load_state_dict", "assign", "in place"])
def test_a_checkpoint_brings_the_step_back(how: str) -> None:
    old, new = Router(4, 8, STAGES, layer=0), Router(4, 8, STAGES, layer=0)
    assert new.top_k == 8, "the step was read before it is loaded"
    steps(old, 2)
    if how == "in place":  # as torch.distributed.checkpoint does
        for name, tensor in new.state_dict().items():
            tensor.detach().copy_(old.state_dict()[name])
    else:
        state = {name: tensor.clone() for name, tensor in old.state_dict().items()}
        new.load_state_dict(state, assign=how == "assign")
    assert new.step == 2
    assert steps(new, 2) == steps(old, 2) == [4, 1]


@pytest.mark.parametrize("loads", range(1, 5))
def test_a_copy_of_a_router_is_at_its_step_though_nobody_asked_since_it_was_loaded(loads: int) -> None:
    old, new = Router(4, 8, STAGES, layer=0), Router(4, 8, STAGES, layer=0)
    assert new.step == 0
    old.settle()
    for _ in range(loads):
        new.load_state_dict(old.state_dict())
        assert copy.deepcopy(new).step == 1
        assert pickle.loads(pickle.dumps(new)).step == 1
    assert new.step == 1


def test_conversion_keeps_the_step() -> None:
    router = Router(4, 8, STAGES, layer=0)
    steps(router, 2)
    assert router.bfloat16().step == 2
    assert router.double().top_k == 4
    router.reset_parameters()
    assert router.top_k == 8


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ((), "first stage starts at step 0; got stages from steps []"),
        (((5, 2),), "first stage starts at step 0; got stages from steps [5]"),
        (((0, 4), (10, 2), (10, 1)), "starts after the one before it; got stages from steps [0, 10, 10]"),
        (((0, 4), (20, 2), (10, 1)), "starts after the one before it; got stages from steps [0, 20, 10]"),
        (((0, (4, 2)), (10, (2,))), "for the same layers; got lists of [1, 2] layers"),
        (((0, (4, 0)),), "every k is at least 1"),
        (((0, 0),), "every k is at least 1"),
    ],
)
def test_stages_that_skip_or_do_not_fit_are_refused(stages: tuple[tuple[int, int]], told: str) -> None:
    with pytest.raises(ValueError) as error:
        Sparsify(stages=stages)
    assert told in str(error.value)


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_is_not_listed_is_refused_when_the_router_is_made(layer: int) -> None:
    with pytest.raises(ValueError, match=f"from step 0 lists k for 3 layers; there is none for {layer}"):
        Router(4, 8, STAGES, layer=layer)


def test_a_k_beyond_the_experts_is_refused_at_whatever_step_it_would_come() -> None:
    late = Sparsify(stages=((0, 2), (1000, 9)))
    with pytest.raises(ValueError, match="top_k=9 of 8 experts"):
        Router(4, 8, late)
    with pytest.raises(ValueError, match="hold only 2 experts"):
        Router(4, 8, Sparsify(stages=((0, 2), (1000, 3))), select=TopK(groups=4))
    with pytest.raises(ValueError, match="MaskRatio takes 2 to 4"):
        Router(4, 8, Sparsify(stages=((0, 2), (9, 1))), select=ExpertChoice(share=MaskRatio(least=2, most=4)))
