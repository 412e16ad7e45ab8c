"""moe-doctor at the command line."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from moe.doctor.cli import app
from tests.launched import launched

SCRIPT = """
import sys

import torch
import torch.distributed as dist

from moe import average_expert_grads, clip_grad_norm, settle_prices
from moe.comm import Peers, sum_over, world_group
from tests.moe.patients import LM, train

assert __name__ == "__main__"
steps, trap = int(sys.argv[1]), sys.argv[2:]
if "many" in trap:
    dist.init_process_group("gloo")


def before_step(model):
    of_experts = {id(p) for layer in model.layers for p in layer.experts.parameters()}
    plain = [p.grad for p in model.parameters() if id(p) not in of_experts]
    sum_over(plain, Peers.of(world_group()))
    for grad in plain:
        grad /= Peers.of(world_group()).size
    if "unaveraged" not in trap:
        average_expert_grads(model, world_group())


model = LM(group=world_group())
settle = (lambda model: None) if "unsettled" in trap else settle_prices
losses = train(model, steps=steps, before_step=before_step, after_step=settle, seed=Peers.of(world_group()).rank)
print("trained", len(losses), "steps")
if "fail" in trap:
    raise RuntimeError("out of luck")
if "many" in trap:
    dist.destroy_process_group()
"""


def run(tmp_path: Path, *words: str, options: tuple[str, ...] = ()) -> Result:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    return CliRunner().invoke(app, [*options, str(script), *words])


def test_a_clean_script_runs_to_its_end_and_exits_with_0(tmp_path: Path) -> None:
    result = run(tmp_path, "--", "3")
    assert result.exit_code == 0, result.output
    assert "trained 3 steps" in result.output
    assert "nothing found (2 MoE blocks, 3 steps, 1 rank)" in result.output


def test_a_script_with_a_trap_exits_with_1_and_is_stopped_after_so_many_steps(tmp_path: Path) -> None:
    result = run(tmp_path, "50", "unsettled", options=("--steps", "4"))
    assert result.exit_code == 1, result.output
    assert "trained" not in result.output
    assert "price-never-settled" in result.output
    assert "4 steps" in result.output


def test_json_is_all_that_is_on_stdout(tmp_path: Path) -> None:
    result = run(tmp_path, "3", "unsettled", options=("--json",))
    (facts,) = json.loads(result.stdout)
    assert (facts["clean"], facts["steps"], facts["ranks"]) == (False, 3, 1)
    assert facts["blocks"] == ["layers.0", "layers.1"]
    (symptom,) = facts["symptoms"]
    assert symptom["name"] == "price-never-settled"
    assert {"module", "evidence", "remedy"} <= set(symptom)
    assert "trained 3 steps" in result.stderr


def test_misuse_exits_with_2_and_says_why(tmp_path: Path) -> None:
    result = run(tmp_path, "3", "fail")
    assert result.exit_code == 2
    assert "failed: RuntimeError: out of luck" in result.stderr
    empty = tmp_path / "empty.py"
    empty.write_text("print('no model')")
    result = CliRunner().invoke(app, [str(empty)])
    assert result.exit_code == 2
    assert "called no model with MoE blocks" in result.stderr
    result = CliRunner().invoke(app, ["nowhere.py"])
    assert result.exit_code == 2
    assert "there is no script nowhere.py" in result.stderr
    assert CliRunner().invoke(app, []).exit_code == 2


def test_it_runs_under_torchrun_and_asks_every_rank(tmp_path: Path) -> None:
    """The script destroys its process group: the ranks are asked before."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moe.doctor"]
    done = launched([*words, str(script), "3", "many", "unaveraged"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "expert-gradient-scale" in done.stdout
    assert done.stdout.count("moe-doctor:") == 1
    assert "2 ranks" in done.stdout
