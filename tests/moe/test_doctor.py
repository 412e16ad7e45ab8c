"""moe-doctor: each trap, planted, is found and nothing else; healthy runs report nothing, and run as ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import moe.clip
from moe import Elastic, charge, clip_grad_norm, settle_after, settle_prices
from moe.doctor import doctor
from moe.doctor.attend import mask_of
from placement import Packed, Topology
from routing import Bip, EdgeQuantile, LossFree, Quantile, Sinkhorn, SwitchLoss, Unpriced
from tests.moe.patients import (
    EXPERTS,
    LM,
    HomeLM,
    batches,
    examined,
    names,
    sgd,
    train,
    update,
    with_aux,
)

BALANCERS = [
    Unpriced(),
    LossFree(),
    LossFree(rule="proportional", step=0.1),
    Bip(),
    Quantile(),
    EdgeQuantile(),
    Sinkhorn(),
]


@pytest.mark.parametrize("balancer", BALANCERS, ids=str)
@pytest.mark.parametrize("recompute", ["none", "reentrant", "non-reentrant"])
def test_a_healthy_model_of_ours_has_no_symptoms(balancer: Any, recompute: str) -> None:
    model = LM(balancer, losses=(SwitchLoss(coefficient=1e-2),), recompute=recompute)
    report = examined(
        model,
        padded=True,
        micro=2,
        loss_of=lambda model, loss: charge(model, loss) / 2,
        before_step=lambda model: clip_grad_norm(model, 0.5),
        after_step=settle_prices,
    )
    assert report.symptoms == ()
    assert (report.steps, len(report.blocks)) == (4, 2)


def test_a_router_may_have_a_lone_number_among_its_parameters() -> None:
    model = LM()
    for layer in model.layers:
        layer.router.register_parameter("heat", nn.Parameter(torch.ones(())))
    assert examined(model, after_step=settle_prices).symptoms == ()


@pytest.mark.parametrize("recompute", ["none", "reentrant", "non-reentrant"])
def test_a_healthy_block_of_somebody_else_has_no_symptoms(recompute: str) -> None:
    model = HomeLM(recompute=recompute)
    report = examined(model, model.adapters(), padded=True, loss_of=with_aux, after_step=update)
    assert report.symptoms == ()


def test_inference_of_a_healthy_model_has_no_symptoms() -> None:
    model = LM().eval()
    with doctor(model) as report, torch.no_grad():
        for ids, mask in batches(4, padded=True):
            model(ids, attention_mask=mask)
    assert report.report.clean
    assert report.report.steps == 0


def test_padding_that_a_layer_was_not_told_of_is_found() -> None:
    report = examined(LM(told=False), padded=True, after_step=settle_prices)
    assert names(report) == {"padding-counted"}
    assert "31.2%" in report.symptoms[0].evidence


def test_padding_that_a_counter_counts_is_found() -> None:
    model = HomeLM("counts padding", "")
    report = examined(model, model.adapters(), padded=True, loss_of=with_aux, after_step=update)
    assert names(report) == {"padding-counted"}
    assert report.symptoms[0].module == "blocks.0"


def test_padding_that_a_balancing_loss_counts_is_found() -> None:
    model = HomeLM("", "padding pays")
    report = examined(model, model.adapters(), padded=True, loss_of=with_aux, after_step=update)
    assert names(report) == {"padding-counted"}
    assert report.symptoms[0].module == "blocks.1"


def test_a_balancing_loss_that_goes_nowhere_is_found() -> None:
    model = HomeLM()
    report = examined(model, model.adapters(), after_step=update)
    assert names(report) == {"aux-loss-detached"}
    assert report.symptoms[0].module == "blocks.0, blocks.1"


def test_a_balancing_loss_that_is_not_divided_by_the_micro_batches_is_found() -> None:
    model = LM(losses=(SwitchLoss(coefficient=1e-2),))
    report = examined(model, micro=4, loss_of=lambda model, loss: charge(model, loss / 4), after_step=settle_prices)
    assert names(report) == {"aux-loss-scale"}
    assert "4 micro-batches" in report.symptoms[0].evidence


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_a_bias_that_moves_again_in_recomputation_is_found(recompute: str) -> None:
    model = HomeLM("moves in recompute", "", recompute=recompute)
    report = examined(model, model.adapters(), loss_of=with_aux, after_step=lambda model: update_but(model, 0))
    assert names(report) == {"price-in-recompute"}


def test_a_bias_that_moves_in_every_micro_batch_is_found() -> None:
    model = HomeLM("moves in forward", "")
    report = examined(model, model.adapters(), micro=2, loss_of=with_aux, after_step=lambda model: update_but(model, 0))
    assert names(report) == {"price-per-forward"}


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_counts_that_recomputation_doubles_are_found(recompute: str) -> None:
    model = HomeLM("counts twice", "", recompute=recompute)
    report = examined(model, model.adapters(), loss_of=with_aux, after_step=update)
    assert names(report) == {"counted-twice"}
    assert "recomputations" in report.symptoms[0].evidence


def test_prices_that_are_settled_for_every_micro_batch_are_found() -> None:
    report = examined(LM(), micro=3, after_backward=settle_prices)
    assert names(report) == {"price-per-forward"}


def test_prices_that_are_settled_twice_a_step_are_found() -> None:
    model = LM()
    optimizer = sgd(model)
    settle_after(optimizer, model)
    assert names(examined(model, optimizer=optimizer, after_step=settle_prices)) == {"price-per-forward"}


def test_prices_that_nobody_settles_are_found() -> None:
    assert names(examined(LM())) == {"price-never-settled"}


def test_a_bias_in_bf16_is_found() -> None:
    model = HomeLM()
    model.blocks[0].bias = model.blocks[0].bias.bfloat16()
    report = examined(model, model.adapters(), loss_of=with_aux, after_step=update)
    assert names(report) == {"price-precision"}


def test_a_router_in_bf16_is_found() -> None:
    model = HomeLM("bf16 router", "")
    report = examined(model, model.adapters(), loss_of=with_aux, after_step=update)
    assert names(report) == {"router-precision"}


def test_expert_gradients_of_another_scale_are_found() -> None:
    def quarter(model: nn.Module) -> None:
        for layer in model.layers:  # type: ignore[union-attr]
            for weight in layer.experts.parameters():  # type: ignore[union-attr]
                weight.grad /= 4

    report = examined(LM(), before_step=quarter, after_step=settle_prices)
    assert names(report) == {"expert-gradient-scale"}
    assert "0.25 times" in report.symptoms[0].evidence


def test_a_part_that_the_balancer_passes_over_is_found() -> None:
    report = examined(LM(), after_step=lambda model: settle_prices(model.layers[0]))
    assert "uncovered" in names(report)
    assert {symptom.module for symptom in report.symptoms} == {"layers.1"}


def test_experts_that_get_nothing_are_found() -> None:
    model = LM(Unpriced())
    model.layers[1].router.price_E[3] = 10.0  # left by another balancer's checkpoint
    report = examined(model)
    assert names(report) == {"dead-experts"}
    assert report.symptoms[0].evidence.startswith("experts 3 of 4 got none of 512 rows")


def test_a_router_that_is_flat_is_found() -> None:
    model = LM()
    with torch.no_grad():
        model.layers[0].router.weight *= 1e-4
    report = examined(model, after_step=settle_prices)
    assert names(report) == {"flat-router"}
    assert report.symptoms[0].module == "layers.0"


@dataclass(frozen=True, kw_only=True)
class Stuck(LossFree):
    """Its update is lost."""

    def settle(self, price_E: Tensor, stats: Any, top_k: int, *, settled: Tensor) -> Tensor:
        return price_E


def test_a_balancer_that_never_moves_a_price_is_found() -> None:
    report = examined(LM(Stuck()), after_step=settle_prices)
    assert names(report) == {"balancer-dead"}


def test_a_bias_that_nobody_updates_is_found() -> None:
    model = HomeLM()
    report = examined(model, model.adapters(), loss_of=with_aux)
    assert names(report) == {"balancer-dead"}


@pytest.mark.parametrize("how", ["ignored", "reversed"])
def test_a_bias_that_does_not_decide_is_found(how: str) -> None:
    model = HomeLM(how, "")
    model.blocks[0].bias += torch.linspace(-0.1, 0.1, EXPERTS)
    report = examined(model, model.adapters(), loss_of=with_aux, after_step=update)
    assert names(report) == {f"price-{how}"}


def test_an_elastic_that_is_not_stepped_is_found() -> None:
    model = LM()
    topology = Topology.fitting(num_experts=EXPERTS, ranks=1, ranks_per_node=1)
    elastic = Elastic(model, None, topology, plan_every=1000, planner=Packed(), advise=None)  # type: ignore[arg-type]
    assert names(examined(model, after_step=settle_prices)) == {"balancer-dead"}
    assert examined(model, after_step=lambda model: (settle_prices(model), elastic.step())).clean


def test_the_doctor_changes_no_number() -> None:
    options: dict[str, Any] = {"padded": True, "micro": 2, "after_step": settle_prices}
    options["before_step"] = lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    for recompute in ("none", "reentrant", "non-reentrant"):
        plain, watched = LM(recompute=recompute), LM(recompute=recompute)
        losses = train(plain, **options)
        with doctor(watched):
            assert train(watched, **options) == losses
        for one, other in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
            assert torch.equal(one, other)


def hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_observers")
    return [len(getattr(module, kind, ())) for module in model.modules() for kind in kinds]


def test_nothing_of_the_doctor_stays_behind() -> None:
    clip, ours, model = torch.nn.utils.clip_grad_norm_, moe.clip.clip_grad_norm, HomeLM()
    before = hooks(model), dict(vars(model.blocks[0])).keys(), len(_global_optimizer_pre_hooks)
    with doctor(model, model.adapters()):
        assert torch.nn.utils.clip_grad_norm_ is not clip
        train(model, steps=1)
    with pytest.raises(KeyError, match="their own"), doctor(model, model.adapters()):
        raise KeyError("their own")
    assert torch.nn.utils.clip_grad_norm_ is clip
    assert moe.clip_grad_norm is ours
    assert (hooks(model), dict(vars(model.blocks[0])).keys(), len(_global_optimizer_pre_hooks)) == before


def test_only_what_tells_padding_is_taken_for_it() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [5, 0, 6, 7]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    for known in (mask, mask.bool(), mask.float()):
        assert torch.equal(mask_of({"attention_mask": known}, None), mask.bool())
    for other in (torch.zeros(2, 4), torch.tensor([[0.0, -1e9]]), torch.ones(4, 4).tril(), torch.ones(2, 1, 4, 4)):
        assert mask_of({"attention_mask": other}, None) is None
    labels = ids.where(mask.bool(), -100)
    assert torch.equal(mask_of({"input_ids": ids, "labels": labels}, 0), mask.bool())
    assert mask_of({"input_ids": ids, "labels": ids}, 0) is None  # a padding token that is learnt is none
    assert mask_of({"input_ids": ids}, 0) is None


def test_a_model_without_experts_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="Linear has no MoE block that the doctor knows; describe yours"),
        doctor(nn.Linear(2, 2)),
    ):
        pass


def test_the_report_is_not_read_before_its_time() -> None:
    with doctor(LM()) as report, pytest.raises(ValueError, match="not over"):
        _ = report.symptoms


def update_but(model: Any, number: int) -> None:
    """The block of this number has moved its bias already."""
    for at, block in enumerate(model.blocks):
        if at != number:
            block.update()
