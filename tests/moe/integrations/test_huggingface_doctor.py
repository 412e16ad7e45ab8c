"""moe-doctor on models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from moe import World, average_expert_grads, clip_grad_norm, settle_prices
from moe.comm import Peers, sum_over, world_group
from moe.doctor import Report, doctor
from moe.integrations.huggingface import parallelize_experts
from routing import Bip, LossFree
from tests.moe.integrations.tiny import checkpointed, make, prompt

Worlds = Callable[[int], World]


def names(report: Report) -> set[str]:
    return {symptom.name for symptom in report.symptoms}


def patient(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Its correction biases are small, so that no expert is out of reach."""
    model = make(family, dtype, **{"num_hidden_layers": 3, **more}).train()
    for name, bias in model.named_buffers():
        if "correction_bias" in name:
            bias.mul_(0.1)
    return model


def own_loss(model: Any, out: Any) -> Tensor:
    loss: Tensor = out.loss
    return loss


def train(
    model: Any,
    *,
    steps: int = 4,
    micro: int = 1,
    loss_of: Callable[[Any, Any], Tensor] = own_loss,
    mask: bool = True,
    labelled: bool = True,
    before_step: Callable[[Any], object] = lambda model: None,
    after_step: Callable[[Any], object] = lambda model: None,
    optimizer: Any = None,
    seed: int = 0,
) -> list[float]:
    """The second half of the second sequence is padding."""
    optimizer = SGD(model.parameters(), lr=0.01) if optimizer is None else optimizer
    losses = []
    for step in range(steps):
        for part in range(micro):
            ids = prompt(100 * seed + 10 * step + part, batch=4, length=16)
            real = torch.ones_like(ids)
            real[1, 8:] = 0
            ids = ids * real
            labels = ids.where(real.bool(), -100) if labelled else None
            out = model(ids, attention_mask=real if mask else None, labels=labels)
            loss = loss_of(model, out)
            loss.backward()
            losses.append(loss.item())
        before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)
    return losses


def examined(model: Any, **options: Any) -> Report:
    with doctor(model) as report:
        train(model, **options)
    return report.report


FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("aux", [False, True], ids=["plain", "with its balancing loss"])
def test_a_healthy_host_has_no_symptoms(family: str, aux: bool) -> None:
    if aux and "router_aux_loss_coef" not in vars(patient(family).config):
        pytest.skip(f"{family} has no balancing loss")
    model = patient(family, output_router_logits=aux)
    report = examined(
        model, micro=2, loss_of=lambda model, out: out.loss / 2,
        before_step=lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5),
    )  # fmt: skip
    assert report.symptoms == ()
    assert len(report.blocks) == (2 if "deepseek" in family or family == "glm4_moe" else 3)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_healthy_host_under_checkpointing_has_no_symptoms(family: str, use_reentrant: bool) -> None:
    model = patient(family)
    checkpointed(model, use_reentrant=use_reentrant)
    assert examined(model).symptoms == ()


def test_the_doctor_changes_no_number_of_a_host() -> None:
    plain, watched = (patient("qwen3_moe", output_router_logits=True) for _ in range(2))
    losses = train(plain)
    with doctor(watched):
        assert train(watched) == losses
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), watched.parameters(), strict=True))


def cross_entropy(out: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_balancing_loss_that_is_left_lying_is_found() -> None:
    """The loop has a loss of its own, of the logits alone."""
    model = patient("mixtral", output_router_logits=True)
    report = examined(model, labelled=False, loss_of=lambda model, out: cross_entropy(out, out.logits.argmin(-1)))
    assert names(report) == {"aux-loss-detached"}
    assert "4 of 4 backwards" in report.symptoms[0].evidence


def test_a_coefficient_that_is_not_multiplied_is_found() -> None:
    model = patient("mixtral", output_router_logits=True)
    report = examined(
        model, labelled=False, loss_of=lambda model, out: cross_entropy(out, out.logits.argmin(-1)) + out.aux_loss
    )
    assert names(report) == {"aux-loss-scale"}
    assert "coefficient was not multiplied" in report.symptoms[0].evidence


def test_a_balancing_loss_that_is_added_for_every_micro_batch_is_found() -> None:
    """Only the own loss is divided by their number."""
    model = patient("mixtral", output_router_logits=True)

    def loss_of(model: Any, out: Any) -> Tensor:
        coefficient = model.config.router_aux_loss_coef
        return (out.loss - coefficient * out.aux_loss) / 4 + coefficient * out.aux_loss  # type: ignore[no-any-return]

    report = examined(model, micro=4, loss_of=loss_of)
    assert names(report) == {"aux-loss-scale"}
    assert "4 micro-batches" in report.symptoms[0].evidence


def test_a_trap_of_trainer_itself_is_found(tmp_path: Path) -> None:
    """It divides the own loss by the tokens of all micro-batches, and adds the balancing loss of each whole."""
    pytest.importorskip("accelerate", reason="accelerate is not installed; pip install 'evenmoe[dev]'")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3,
        optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in prompt(0, batch=16, length=16)]
    model = patient("mixtral", output_router_logits=True)
    with doctor(model) as report:
        Trainer(model, arguments, train_dataset=data).train()
    assert names(report.report) == {"aux-loss-scale"}
    assert "weighs 4 times" in report.symptoms[0].evidence


def test_a_balancing_loss_without_the_mask_is_found() -> None:
    """No attention_mask: padding is told by its token and its missing labels."""
    model = patient("mixtral", output_router_logits=True)
    report = examined(model, mask=False)
    assert names(report) == {"padding-counted"}


def test_layers_that_hide_each_other_are_found() -> None:
    """Each layer sends nearly all tokens to two experts of its own."""
    model = patient("mixtral", output_router_logits=True, num_local_experts=6)
    for number, layer in enumerate(model.model.layers):
        steer(layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe, (2 * number, 2 * number + 1))
    report = examined(model)
    assert "aux-loss-pools-layers" in names(report)
    assert names(report) <= {"aux-loss-pools-layers", "dead-experts"}


def steer(block: Any, experts: tuple[int, ...]) -> None:
    """The router's lines of some experts are large, with opposite signs, so that one of them is high for any token."""
    with torch.no_grad():
        weight = block.gate.weight
        weight *= 0.01
        line = torch.ones(weight.shape[1])
        block.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
        for expert in experts:
            weight[expert] += 0.5 * line


def test_a_host_in_bf16_is_found_by_its_router() -> None:
    report = examined(patient("mixtral", torch.bfloat16))
    assert names(report) == {"router-precision"}
    assert "tokens choose other experts" in report.symptoms[0].evidence


def test_a_correction_bias_in_bf16_is_found() -> None:
    assert names(examined(patient("deepseek_v3", torch.bfloat16))) == {"price-precision"}


def test_padding_that_a_balancer_of_ours_counts_in_a_host_is_found() -> None:
    model = parallelize_experts(patient("mixtral"), balancer=LossFree())
    assert names(examined(model, after_step=settle_prices)) == {"padding-counted"}


def test_an_optimiser_that_is_older_than_the_spread_experts_is_found() -> None:
    model = patient("qwen3_moe")
    optimizer = SGD(model.parameters(), lr=0.01)
    parallelize_experts(model)
    report = examined(model, optimizer=optimizer)
    assert names(report) == {"uncovered"}
    assert "no optimiser that steps holds them" in report.symptoms[0].evidence


def averaged(model: Any) -> None:
    of_experts = {id(p) for name, p in model.named_parameters() if ".experts." in name}
    plain = [p.grad for p in model.parameters() if id(p) not in of_experts]
    sum_over(plain, Peers.of(world_group()))
    for grad in plain:
        grad.div_(2)
    average_expert_grads(model, world_group())


def spread(family: str, balancer: Any, trap: str) -> set[str]:
    model = parallelize_experts(patient(family), world_group(), balancer=balancer)

    def before_step(model: Any) -> None:
        averaged(model)
        if trap == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        else:
            clip_grad_norm(model, 0.1)

    def unpadded(model: Any, steps: int = 4) -> None:
        optimizer = SGD(model.parameters(), lr=0.01)
        for step in range(steps):
            ids = prompt(10 * step + Peers.of(world_group()).rank, batch=4, length=16)
            model(ids, labels=ids).loss.backward()
            before_step(model)
            optimizer.step()
            optimizer.zero_grad()
            settle_prices(model)

    with doctor(model) as report:
        unpadded(model)
    return names(report.report)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_healthy_spread_host_has_no_symptoms(world: Worlds, family: str) -> None:
    assert world(2).run(spread, family, None, "") == [set()] * 2
    assert world(2).run(spread, family, Bip(), "") == [set()] * 2


def test_a_norm_of_a_ranks_own_experts_is_found_in_a_host(world: Worlds) -> None:
    assert world(2).run(spread, "qwen3_moe", None, "norm") == [{"grad-norm"}] * 2
