"""scripts/train.py: the same run on any number of ranks, and from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe import MoEConfig, World
from moe.comm import world_group
from routing import LeastLoaded
from scripts.model import Shape
from scripts.text import batch_of, split_by_file
from scripts.train import BALANCE, Run, Trainer, small, train


def tiny(balance: str, steps: int = 6) -> Run:
    shape = small(balance, experts=8, top_k=2)
    shape = replace(shape, layers=2, length=32, moe=replace(shape.moe, dim=16, hidden=16))
    return Run(shape=shape, steps=steps, sequences=4)


def losses_of(run: Run, steps: int) -> list[float]:
    trainer, (text, _) = Trainer(run, world_group()), split_by_file()
    return [trainer.learn(text).item() for _ in range(steps)]


@pytest.mark.parametrize("balance", [name for name in BALANCE if name not in ("bip", "quantile", "switch")])
def test_two_ranks_learn_what_one_process_learns(world: Callable[[int], World], balance: str) -> None:
    """But for balancers that look at one rank's batch alone, which is another batch on two ranks."""
    run = tiny(balance)
    run = replace(run, shape=replace(run.shape, moe=replace(run.shape.moe, assigner=LeastLoaded())))
    alone = losses_of(run, 6)
    for losses in world(2).run(losses_of, run, 6):
        assert losses == pytest.approx(alone, rel=1e-4)


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path) -> None:
    run = tiny("quantile")
    whole = train(Trainer(run, None), tmp_path / "whole")
    interrupted = Trainer(run, None)
    text, _ = split_by_file()
    for _ in range(3):
        interrupted.learn(text)
    (tmp_path / "parts").mkdir()
    interrupted.save(tmp_path / "parts" / "rank0of1.pt")
    parts = train(Trainer(run, None), tmp_path / "parts")
    seconds = {"seconds_per_step", "first_max_vio"}
    assert {k: v for k, v in parts.items() if k not in seconds} == {k: v for k, v in whole.items() if k not in seconds}
    assert json.loads((tmp_path / "parts" / "result.json").read_text()) == parts
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    train(Trainer(tiny("none", 2), None), tmp_path)
    with pytest.raises(ValueError, match="another run"):
        train(Trainer(tiny("bip", 2), None), tmp_path)
    (tmp_path / "rank0of4.pt").touch()
    with pytest.raises(ValueError, match="another number of ranks"):
        train(Trainer(tiny("none", 2), None), tmp_path)


def test_sequences_that_do_not_divide_over_the_ranks_are_refused(world: Callable[[int], World]) -> None:
    errors = world(2).run(refusal, replace(tiny("none"), sequences=3))
    assert all("3 sequences a step do not divide over 2 ranks x 1 turns" in error for error in errors)


def refusal(run: Run) -> str:
    try:
        Trainer(run, world_group())
    except ValueError as error:
        return str(error)
    return ""


def test_no_file_is_both_learnt_and_held_out() -> None:
    learnt, unseen = split_by_file()
    assert len(learnt) > 4 * len(unseen) > 0
    head = bytes(unseen[:400].tolist())
    assert head not in bytes(learnt.tolist())


def test_a_batch_is_followed_by_its_next_bytes() -> None:
    text = torch.arange(100)
    byte_BT, next_BT = batch_of(text, 3, 8, torch.Generator().manual_seed(0))
    assert torch.equal(next_BT, byte_BT + 1)
    assert byte_BT.shape == (3, 8)


def test_a_shape_numbers_its_layers() -> None:
    from scripts.model import Bytes

    model = Bytes(Shape(moe=MoEConfig(dim=16, hidden=16, num_experts=4, top_k=1), layers=3, length=8))
    assert [block.moe.config.layer for block in model.blocks] == [0, 1, 2]
