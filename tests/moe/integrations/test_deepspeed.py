"""A DeepSpeed engine trains a model with MoE layers as one process does, and saves and loads it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

if find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed; pip install 'evenmoe[deepspeed]'", allow_module_level=True)

from moe import MoE, World, checkpoint, clip_grad_norm, settle_prices
from placement import Placement
from routing import LeastLoaded, LossFree
from tests.moe.integrations import engines
from tests.moe.integrations.engines import (
    CONFIG,
    EXPERTS,
    MICRO,
    Net,
    Trained,
    adam,
    distance,
    engine_of,
    error,
    settings,
    sgd,
    state_of,
    steps,
    whole,
)
from tests.world import relative

Worlds = Callable[[int], World]
Make = Callable[[Any], Optimizer]
IN_ORDER = Placement(expert_RS=np.arange(EXPERTS).reshape(2, -1))


@pytest.fixture(scope="module")
def world(world: Worlds) -> Worlds:
    """Ranks that have imported deepspeed before anybody counts the seconds."""

    def of(ranks: int) -> World:
        started = world(ranks)
        usual, started.timeout = started.timeout, timedelta(seconds=300)
        started.run(_import_it)
        started.timeout = usual
        return started

    return of


def _import_it() -> None:
    engines.import_deepspeed()


def trained(stage: int, ep_size: int, make: Make, recompute: bool = False, autocast: bool = False) -> Trained:
    engine = engine_of(settings(stage), ep_size, make)
    engine.module.recompute, engine.module.autocast = recompute, autocast
    return state_of(engine.module, steps(engine))


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("ranks, ep_size", [(4, 2), (2, 2), (2, 1)])
def test_an_engine_takes_the_steps_of_one_process(world: Worlds, ranks: int, ep_size: int, make: Make) -> None:
    """Accumulated, clipped, least-loaded, prices settled; ZeRO 0, 1, 2."""
    alone = whole(ranks, make)
    start = error(state_of(Net(), []), alone)
    for stage in (0, 1, 2):
        answers = world(ranks).run(trained, stage, ep_size, make)
        for answer in answers:
            assert answer.norms == pytest.approx(alone.norms, rel=1e-5), f"ZeRO-{stage}"
            assert error(answer, alone) < 1e-4 * start, f"ZeRO-{stage}"
            assert torch.equal(answer.price_E, alone.price_E)
        for rank in range(ranks - ep_size):  # those that hold the same experts
            assert error(answers[rank], answers[rank + ep_size]) == 0
        if ranks == 4:  # hooks that reduce gradients must not care that experts visit in one half and not in the other
            assert any(bool(one) != bool(other) for one, other in zip(answers[0].loans, answers[2].loans))
    assert alone.price_E.any()


def test_recomputation_changes_nothing_under_an_engine(world: Worlds) -> None:
    plain, again = (world(2).run(trained, 2, 2, sgd, recompute)[1] for recompute in (False, True))
    assert error(plain, again) < 1e-6
    assert torch.equal(plain.price_E, again.price_E)


def test_under_autocast_zero_does_not_mix_gradients_up_where_one_half_lends_and_the_other_not(world: Worlds) -> None:
    """Without ZeRO no gradient is reduced before all are there, so their order cannot matter."""
    plain, zero = (world(4).run(trained, stage, 2, sgd, False, True) for stage in (0, 2))
    assert bool(zero[0].loans[0]) != bool(zero[2].loans[0])
    for one, other in zip(plain, zero):
        assert other.norms[0] == pytest.approx(one.norms[0], rel=1e-4)
        assert distance(other, one) < 1e-3


def in_half_precision(stage: int, more: dict[str, Any]) -> Trained:
    engine = engine_of(settings(stage, bf16={"enabled": True}, **more), 2, adam)
    norms = steps(engine)
    assert engine.module.expertly_named.experts.up.dtype == torch.bfloat16
    assert engine.module.expertly_named.router.price_E.dtype == torch.float32
    return state_of(engine.module, norms)


@pytest.mark.parametrize(
    "stage, more", [(1, {}), (2, {}), (1, {"data_types": {"grad_accum_dtype": "fp32"}})], ids=["1", "2", "1 in fp32"]
)
def test_bf16_training_stays_near_that_in_fp32(world: Worlds, stage: int, more: dict[str, Any]) -> None:
    alone = whole(4, adam)
    start = distance(state_of(Net(), []), alone)
    answers = world(4).run(in_half_precision, stage, more)
    for answer in answers:
        assert answer.norms == pytest.approx(alone.norms, rel=0.05)
        assert distance(answer, alone) < 0.2 * start
    assert error(answers[0], answers[2]) == 0 == error(answers[1], answers[3])


def skipped() -> list[int]:
    config = settings(2, bf16={"enabled": True, "check_grad_overflow": True})
    engine = engine_of(config, 2, adam)
    router, said = engine.module.expertly_named.router, []
    for scale in (1.0, float("inf"), 1.0):
        steps(engine, range(1), scale)
        said += [int(router.settled), int(router.stats["tokens"])]
    return said


def test_a_step_that_is_skipped_settles_nothing_and_its_tokens_count_in_the_next(world: Worlds) -> None:
    unsettled = MICRO * engines.TOKENS
    assert world(2).run(skipped) == [[1, 0, 1, unsettled, 2, 0]] * 2


def resumed(folder: str, stage: int) -> tuple[Trained, Trained]:
    """Three steps in one go; and two, saved, loaded by another engine that has gone elsewhere, and the third."""
    engine = engine_of(settings(stage), 2)
    steps(engine, range(2))
    engine.save_checkpoint(folder, tag="two")
    assert not [name for name in engine.module.state_dict() if "deepspeed" in name]
    through = state_of(engine.module, steps(engine, [2]))
    other = engine_of(settings(stage), 2)
    steps(other, [7])
    other.load_checkpoint(folder, tag="two")
    again = state_of(other.module, steps(other, [2]))
    engine(*engines.batch(dist.get_rank(), 9))
    engine.save_checkpoint(folder, tag="within a step")
    other.load_checkpoint(folder, tag="within a step")
    assert not any(stat.any() for stat in other.module.expertly_named.router.stats.values())
    return through, again


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_that_was_saved_and_loaded_goes_on_to_the_bit(world: Worlds, tmp_path: Path, stage: int) -> None:
    for through, again in world(4).run(resumed, str(tmp_path), stage):
        assert error(again, through) == 0
        assert again.norms == through.norms
        assert torch.equal(again.price_E, through.price_E)


def carried(folder: str, stage: int, in_order: bool) -> dict[str, Any]:
    """Saved with ep_size 2; loaded by an engine with 4. -> what it has then, and what is said of what it cannot have"""
    engine = engine_of(settings(stage), 2, in_order=in_order)
    steps(engine, range(1))
    engine.save_checkpoint(folder, tag="two")
    checkpoint.save(f"{folder}/ours", engine.module)
    other = engine_of(settings(stage), 4, in_order=in_order)
    said, before = [], state_of(other.module, [])
    for alone in (False, True):
        try:
            other.load_checkpoint(folder, tag="two", load_module_only=alone)
        except ValueError as refusal:
            said.append(str(refusal))
            assert error(state_of(other.module, []), before) == 0, "what does not fit changes nothing"
    loaded = state_of(other.module, [])
    other.load_weights(f"{folder}/ours")
    ours = state_of(other.module, [])
    for group in other.optimizer.param_groups:
        group["lr"] = 0.0
    steps(other, range(1))  # of no length: what ZeRO keeps beside the weights must be the new ones
    saved, kept = state_of(engine.module, []), state_of(other.module, [])
    return {"said": said, "saved": saved, "loaded": loaded, "ours": ours, "kept": kept}


@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "dealt"])
@pytest.mark.parametrize("stage", [0, 2])
def test_weights_go_to_another_ep_size(world: Worlds, tmp_path: Path, stage: int, in_order: bool) -> None:
    """DeepSpeed's own files carry them where places and experts have one order, ours wherever experts live."""
    answers = world(4).run(carried, str(tmp_path), stage, in_order)
    saved = answers[0]["saved"]
    saved.experts.update(answers[1]["saved"].experts)
    assert saved.experts.keys() == set(range(EXPERTS))
    for answer in answers:
        assert [error(answer[what], saved) for what in ("ours", "kept")] == [0, 0]
        assert torch.equal(answer["ours"].price_E, saved.price_E)
        if in_order:
            assert error(answer["loaded"], saved) == 0
            assert torch.equal(answer["loaded"].price_E, saved.price_E)
            assert ["load_module_only=True" in text for text in answer["said"]] == [True]
        else:
            assert ["use moe.checkpoint.save" in text for text in answer["said"]] == [True, True]


def by_config() -> tuple[list[float], float]:
    """An optimiser that DeepSpeed makes, of groups with settings of their own."""
    from moe.integrations.deepspeed import expert_group, initialize

    model = Net(expert_group(2))
    slow = [weight for name, weight in model.named_parameters() if name.endswith("down")]
    rest = [weight for name, weight in model.named_parameters() if not name.endswith("down")]
    config = settings(1, optimizer={"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}})
    before = model.expertly_named.experts.down.detach().clone()
    groups = [{"params": rest}, {"params": slow, "lr": 0.0, "weight_decay": 0.0}]
    engine = initialize(model=model, model_parameters=groups, config=config)[0]
    steps(engine)
    moved = (model.expertly_named.experts.down - before).abs().max().item()
    return sorted(group["lr"] for group in engine.optimizer.param_groups), moved


def test_experts_keep_the_settings_of_the_group_they_were_in(world: Worlds) -> None:
    said = world(2).run(by_config)
    assert said == [([0.0, 1e-2, 1e-2], 0.0)] * 2


def refusals(folder: str) -> dict[str, str]:
    """What is said of what cannot work."""
    deepspeed = engines.import_deepspeed()
    from moe.integrations.deepspeed import expert_group, initialize

    group, config = expert_group(2), settings(1)
    net = Net(group)
    uneven = Placement(expert_RS=np.array([[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]]))
    file = Path(folder) / f"{dist.get_rank()}.json"
    file.write_text('{"train_batch_size": 2, "zero_optimization": {"stage": 3}}')
    crossed = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][dist.get_rank() % 2]
    scheduled = adam(net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(scheduled, 1)
    tries: dict[str, Callable[[], Any]] = {
        "forgotten": lambda: deepspeed.initialize(model=Net(group), optimizer=sgd(net.parameters()), config=config),
        "ZeRO-3": lambda: engine_of(settings(3), 2),
        "ZeRO-3 in a file": lambda: initialize(model=net, optimizer=adam(net.parameters()), config=str(file)),
        "uneven": lambda: engine_of(config, 2, model=Net(group, uneven)),
        "foreign group": lambda: engine_of(config, 2, model=Net(crossed)),
        "no such group": lambda: expert_group(3),
        "no layer": lambda: engine_of(config, 2, model=nn.Linear(2, 2)),
        "half precision without ZeRO": lambda: engine_of(settings(0, bf16={"enabled": True}), 2),
        "data before experts": lambda: engine_of(settings(1, use_data_before_expert_parallelism=True), 2),
        "mpu": lambda: initialize(model=net, optimizer=adam(net.parameters()), config=config, mpu=object()),
        "schedule": lambda: initialize(model=net, optimizer=scheduled, config=config, lr_scheduler=schedule),
        "moved": lambda: engine_of(config, 2).module.expertly_named.rehome(IN_ORDER, {}),
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = "nothing"
        except ValueError as refusal:
            said[name] = str(refusal)
    return said


def test_what_cannot_work_is_one_clear_error(world: Worlds, tmp_path: Path) -> None:
    wanted = {
        "forgotten": "in the place of deepspeed.initialize use moe.integrations.deepspeed.initialize",
        "ZeRO-3": "ZeRO-3 cannot hold these MoE layers; use zero_optimization stage 0, 1 or 2",
        "ZeRO-3 in a file": "ZeRO-3 cannot hold these MoE layers",
        "uneven": "has 8 experts, [5, 3] of them on each rank; DeepSpeed needs equally many",
        "foreign group": "DeepSpeed would not put together; build it with group=",
        "no such group": "ep_size=3 on 4 ranks",
        "no layer": "no MoE layer",
        "half precision without ZeRO": "use zero_optimization stage 1 or 2, or fp32",
        "data before experts": "use_data_before_expert_parallel",
        "mpu": "leave out PipelineModule and mpu",
        "schedule": "lr_scheduler=lambda optimizer",
        "moved": "experts stay where they are",
    }
    for said in world(4).run(refusals, str(tmp_path)):
        assert {name: text in said[name] for name, text in wanted.items()} == dict.fromkeys(wanted, True), said


@pytest.mark.fast
def test_a_plain_layer_refuses_an_engine() -> None:
    with pytest.raises(ValueError, match="would average them"):
        MoE(CONFIG).set_deepspeed_parallelism(False)


def host_model(group: Any) -> Any:
    from moe.integrations.huggingface import parallelize_experts
    from tests.moe.integrations.tiny import make

    model = make("mixtral", torch.float32).train()
    return parallelize_experts(model, group, assigner=LeastLoaded(headroom=1.2), balancer=LossFree(step=1e-2))


def host_trained(folder: str) -> dict[str, Any]:
    """Two steps, saved and loaded. -> `host_state`"""
    engines.import_deepspeed()
    from moe.integrations.deepspeed import expert_group
    from tests.moe.integrations.tiny import prompt

    model = host_model(expert_group(2))
    engine = engine_of(settings(2, gradient_accumulation_steps=1), 2, sgd, model=model)
    for step in range(2):
        x = prompt(10 * step + dist.get_rank())
        engine.backward(engine(x, labels=x).loss)
        engine.step()
    engine.save_checkpoint(folder)
    held = host_state(model)
    for tensor in model.state_dict().values():
        tensor.zero_()
    engine.load_checkpoint(folder)
    for name, (_, tensor) in host_state(model).items():
        assert torch.equal(tensor, held[name][1]), name
    return held


def host_state(model: Any) -> dict[str, Any]:
    """name -> (the experts in its lines, weight); and the prices"""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoE)}
    state = {name: (None, weight.detach().clone()) for name, weight in model.named_parameters()}
    for name, layer in layers.items():
        for leaf, weight in layer.experts.named_parameters():
            state[f"{name}.experts.{leaf}"] = (layer.experts.expert_ids, weight.detach().clone())
        state[f"{name}.price_E"] = (None, layer.router.price_E.clone())
    return state


def test_a_hugging_face_model_is_trained_and_saved_with_its_prices(world: Worlds, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")
    from tests.moe.integrations.tiny import prompt

    model = host_model(None)
    optimizer = sgd(model.parameters())
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            x = prompt(10 * step + rank)
            (model(x, labels=x).loss / 2).backward()
        assert clip_grad_norm(model, 0.1) > 0.1
        optimizer.step()
        settle_prices(model, None)
    want = host_state(model)
    for answer in world(2).run(host_trained, str(tmp_path)):
        assert answer.keys() == want.keys()
        for name, (ids, tensor) in answer.items():
            there = want[name][1] if ids is None else want[name][1][list(ids)]
            assert relative(tensor, there) < 1e-5, name
        assert any(tensor.any() for name, (_, tensor) in answer.items() if name.endswith("price_E"))
