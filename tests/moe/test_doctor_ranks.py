"""moe-doctor on two ranks: what it takes several to see."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe import average_expert_grads, clip_grad_norm, leave_experts_alone, settle_prices
from moe.comm import Peers, sum_over, world_group
from moe.doctor import Report, doctor
from routing import Bip, LossFree, Quantile, Unpriced
from tests.moe.patients import LM, Worlds, names, train


def average_spread(model: nn.Module, group: Any) -> None:
    for layer in model.layers:  # type: ignore[union-attr]
        if layer.peers.size > 1:
            average_expert_grads(layer, group)


def averaged(model: nn.Module, *, experts: Any = average_spread) -> None:
    """What data parallelism does to gradients, by hand."""
    peers = Peers.of(world_group())
    of_experts = {id(p) for layer in model.layers if layer.peers.size > 1 for p in layer.experts.parameters()}  # type: ignore[union-attr]
    plain = [p.grad for p in model.parameters() if id(p) not in of_experts and p.grad is not None]
    sum_over(plain, peers)
    for grad in plain:
        grad.div_(peers.size)
    experts(model, world_group())


def nothing(model: nn.Module, group: Any) -> None:
    """Experts left as they are: their gradients are sums over the ranks."""


def of_rank(**options: Any) -> Any:
    """Trained on this rank's data."""
    return partial(train, seed=dist.get_rank(), **options)


def watched(model: nn.Module, run: Any) -> tuple[set[str], str]:
    with doctor(model) as report:
        run(model)
    done: Report = report.report
    return names(done), " ".join(f"{symptom.module}: {symptom.evidence}" for symptom in done.symptoms)


def clip(model: nn.Module) -> None:
    averaged(model)
    clip_grad_norm(model, 0.3)


def healthy(balancer: Any) -> tuple[set[str], str]:
    model = LM(balancer, group=world_group())
    return watched(model, of_rank(padded=True, micro=2, before_step=clip, after_step=settle_prices))


def healthy_ddp() -> tuple[set[str], str]:
    """The model in DDP, which the doctor is given."""
    model = LM(group=world_group())
    parallel = DistributedDataParallel(leave_experts_alone(model))
    run = of_rank(
        before_step=lambda wrapped: average_expert_grads(model, world_group()),
        after_step=lambda _: settle_prices(model),
    )
    return watched(parallel, run)


def healthy_replicas() -> tuple[set[str], str]:
    """Every rank holds all experts."""
    return watched(LM(), of_rank(before_step=averaged, after_step=settle_prices))


def unaveraged() -> tuple[set[str], str]:
    run = of_rank(before_step=partial(averaged, experts=nothing), after_step=settle_prices)
    return watched(LM(group=world_group()), run)


def clipped_by_torch() -> tuple[set[str], str]:
    def clip(model: nn.Module) -> None:
        averaged(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    return watched(LM(group=world_group()), of_rank(before_step=clip, after_step=settle_prices))


def settled_alone() -> tuple[set[str], str]:
    run = of_rank(before_step=averaged, after_step=lambda model: settle_prices(model, None))
    return watched(LM(LossFree(step=1e-2, rule="proportional"), group=world_group()), run)


def half_spread() -> tuple[set[str], str]:
    model = LM(groups=(world_group(), None))
    return watched(model, of_rank(before_step=averaged, after_step=settle_prices))


def without_tokens() -> tuple[set[str], str]:
    run = of_rank(rows=4 * (1 - dist.get_rank()), before_step=averaged, after_step=settle_prices)
    return watched(LM(group=world_group()), run)


def failing() -> str:
    """One rank fails: it says what it saw, without waiting for the others."""
    model = LM(group=world_group())
    try:
        with doctor(model) as report:
            train(model, before_step=averaged, steps=2)
            raise KeyError
    except KeyError:
        return str(report.report.alone)


BREAKING = {
    "begins": "agreement._digest",
    "opens": "prices.PriceClock.opens",
    "hears": "loads.DeadExperts.hears",
    "in backward": "losses._cross_entropy_scale",
    "gives evidence": "coverage.Coverage.evidence",
    "concludes": "counts.Counts.conclude",
}


def broken(what: str) -> Report:
    """With a trap planted, and on the last rank an examiner that fails."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == dist.get_world_size() - 1:
            patch.setattr(f"moe.doctor.{what}", _fails)
        model = LM(group=world_group())
        with doctor(model) as report:
            of_rank(before_step=partial(averaged, experts=nothing), after_step=settle_prices)(model)
    return report.report


def _fails(*_: object) -> Any:
    raise LookupError("it broke")


@pytest.mark.parametrize("balancer", [Unpriced(), LossFree(), Bip(), Quantile()], ids=str)
def test_a_healthy_model_on_two_ranks_has_no_symptoms(world: Worlds, balancer: Any) -> None:
    assert world(2).run(healthy, balancer) == [(set(), "")] * 2


@pytest.mark.parametrize("run", [healthy_ddp, healthy_replicas], ids=lambda run: run.__name__)
def test_healthy_data_parallelism_has_no_symptoms(world: Worlds, run: Any) -> None:
    assert world(2).run(run) == [(set(), "")] * 2


@pytest.mark.parametrize(
    "run, name, told",
    [
        (unaveraged, "expert-gradient-scale", "2 times those of the other parameters, the number of ranks"),
        (clipped_by_torch, "grad-norm", "of 4 clippings the norm was"),
        (settled_alone, "price-disagreement", "from step 1 of 4 on"),
        (half_spread, "uncovered", "layers.1: its experts are whole on each of 2 ranks"),
        (without_tokens, "idle-rank", "ranks 1 of the layer's 2 brought no token"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_trap_of_many_ranks_is_found_on_every_rank(world: Worlds, run: Any, name: str, told: str) -> None:
    for found, evidence in world(2).run(run):
        assert found == {name}
        assert told in evidence


@pytest.mark.parametrize("what", BREAKING.values(), ids=BREAKING.keys())
def test_an_examiner_that_fails_on_one_rank_is_told_on_all_and_the_others_go_on(world: Worlds, what: str) -> None:
    first, second = world(2).run(broken, what)
    assert first == second
    assert names(first) == {"expert-gradient-scale", "examiner-failed"}
    (told,) = [symptom.evidence for symptom in first.symptoms if symptom.name == "examiner-failed"]
    assert "failed on rank 1: LookupError: it broke (test_doctor_ranks.py, line " in told


def test_a_rank_that_fails_reports_alone(world: Worlds) -> None:
    assert world(2).run(failing) == ["True"] * 2
