"""Checkpoints by expert: any number of ranks loads what any number saved, optimiser included; faults are one error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from moe import MoE, MoEConfig, World, checkpoint, settle_prices
from moe.comm import Peers, read_tensors, stored_tensors, sum_over, world_group, write_tensors
from placement import Placement
from routing import LossFree

Worlds = Callable[[int], World]
CONFIG = MoEConfig(dim=6, hidden=4, num_experts=6, top_k=2, bias=True, balancer=LossFree(step=0.01), shared_hidden=3)
ALONE = Peers(group=None, rank=0, size=1)


class Net(nn.Module):
    """Two MoE layers and a plain one between them."""

    def __init__(self, config: MoEConfig = CONFIG, placement: Placement | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = MoE(config, world_group(), placement), nn.Linear(config.dim, config.dim)
        self.last = MoE(config, world_group())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.middle(self.first(x))))
        return y


class Masters(AdamW):
    """Keeps its weights in double precision, and a plain number beside."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                master = self.state[weight].setdefault("master", weight.detach().double())
                master.sub_(group["lr"] * weight.grad.double())
                weight.copy_(master)
                self.state[weight]["count"] = self.state[weight].get("count", 0) + 1


def train(net: Net, optimizer: Optimizer, steps: Sequence[int]) -> None:
    """Each step has the same 12 tokens on any number of ranks."""
    peers = Peers.of(world_group())
    experts = {id(weight) for layer in (net.first, net.last) for weight in layer.experts.parameters()}
    for step in steps:
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))[peers.rank :: peers.size]
        optimizer.zero_grad()
        F.mse_loss(net(x), x.flip(1), reduction="sum").div(12).backward()
        sum_over([w.grad for w in net.parameters() if id(w) not in experts and w.grad is not None], peers)
        optimizer.step()
        settle_prices(net)


def optimizer_of(net: Net, kind: str = "adamw") -> Optimizer:
    if kind == "adamw":
        return AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    return Masters(net.parameters(), lr=0.01) if kind == "masters" else SGD(net.parameters(), lr=0.01, momentum=0.9)


def whole(net: Net, optimizer: Optimizer) -> dict[str, Any]:
    """Everything, of this rank's experts and of what all ranks have, as arrays."""
    found = {name: buffer.numpy().copy() for name, buffer in net.named_buffers() if "stat_" not in name}
    for name, weight in net.named_parameters():
        slots = range(len(weight)) if ".experts." in name else [slice(None)]
        layer = net.first if name.startswith("first") else net.last
        for slot in slots:
            which = f"{name}[{layer.experts.expert_ids[slot]}]" if isinstance(slot, int) else name
            found[which] = weight.detach()[slot].numpy().copy()
            for key, value in optimizer.state[weight].items():
                line = value[slot] if isinstance(value, Tensor) and value.ndim else value
                found[f"{which}.{key}"] = line.numpy().copy() if isinstance(line, Tensor) else np.array(line)
    return found


def save_after(folder: str, steps: Sequence[int], kind: str, copies: bool) -> dict[str, Any]:
    net = Net(placement=COPIES if copies else None)
    optimizer = optimizer_of(net, kind)
    train(net, optimizer, steps)
    checkpoint.save(folder, net, optimizer)
    return whole(net, optimizer)


def load_after(folder: str, kind: str, place: bool) -> dict[str, Any]:
    net = Net(placement=reversed_on(Peers.of(world_group()).size) if place else None)
    with torch.no_grad():
        for weight in net.parameters():
            weight.fill_(7.0)
    optimizer = optimizer_of(net, kind)
    optimizer.param_groups[0]["lr"] = 123.0
    checkpoint.load(folder, net, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01
    return whole(net, optimizer)


COPIES = Placement(expert_RS=np.array([[0, 1, 2], [3, 4, 0], [5, 2, -1], [1, -1, -1]]))


def reversed_on(ranks: int) -> Placement:
    """Everything on the last ranks, one expert twice."""
    expert_RS = np.full((ranks, 6), -1)
    expert_RS[-1] = [5, 4, 3, 2, 1, 0]
    if ranks > 1:
        expert_RS[0, 3] = 2
    return Placement(expert_RS=expert_RS)


def together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' parts as one; what two of them have must be the same."""
    union: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            assert np.array_equal(union.setdefault(name, value), value), name
    return union


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(found[name], value), name
        assert found[name].dtype == value.dtype, name


@pytest.mark.parametrize("kind, copies", [("adamw", False), ("adamw", True), ("masters", False), ("sgd", False)])
def test_what_four_ranks_saved_any_number_of_ranks_loads_to_the_bit(
    world: Worlds, tmp_path: Path, kind: str, copies: bool
) -> None:
    saved = together(world(4).run(save_after, f"{tmp_path}/c", range(3), kind, copies))
    assert_same(load_after(f"{tmp_path}/c", kind, False), saved)
    for ranks in (2, 3) if kind == "adamw" else ():
        for place in (False, True):
            assert_same(together(world(ranks).run(load_after, f"{tmp_path}/c", kind, place)), saved)


def test_five_ranks_one_of_them_without_an_expert_load_it(world: Worlds, tmp_path: Path) -> None:
    saved = together(world(4).run(save_after, f"{tmp_path}/c", range(2), "adamw", False))
    with World(5) as five:
        assert_same(together(five.run(load_after, f"{tmp_path}/c", "adamw", True)), saved)


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(world: Worlds, tmp_path: Path) -> None:
    straight = together(world(2).run(save_after, f"{tmp_path}/whole", range(6), "adamw", False))
    world(2).run(save_after, f"{tmp_path}/half", range(3), "adamw", False)
    assert_same(together(world(2).run(_resume, f"{tmp_path}/half")), straight)


def _resume(folder: str) -> dict[str, Any]:
    net = Net()
    optimizer = optimizer_of(net)
    checkpoint.load(folder, net, optimizer)
    train(net, optimizer, range(3, 6))
    return whole(net, optimizer)


def test_statistics_of_an_unsettled_step_are_kept_as_their_sum(world: Worlds, tmp_path: Path) -> None:
    sums = world(4).run(_observe, f"{tmp_path}/c")
    loaded = world(2).run(_observed, f"{tmp_path}/c")
    assert sum(loaded) == sums[0] == 24 == loaded[0]
    assert checkpoint.verify(f"{tmp_path}/c", Net()) == ()


def _observe(folder: str) -> float:
    net = Net()
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))[Peers.of(world_group()).rank :: 4]
    net(x)
    checkpoint.save(folder, net)
    before = net.first.router.stats["load_E"].sum().clone()
    assert before == 6, "saving changes nothing"
    settle_prices(net)
    return float(net.first.router.closed["load_E"].sum())


def _observed(folder: str) -> float:
    net = Net()
    checkpoint.load(folder, net)
    return float(net.first.router.stats["load_E"].sum())


def saved(folder: Path, kind: str = "adamw") -> tuple[Net, Optimizer, dict[str, Tensor]]:
    """A checkpoint of one process -> the model, its optimiser, and every tensor of the checkpoint, to be spoilt."""
    net = Net()
    optimizer = optimizer_of(net, kind)
    train(net, optimizer, range(2))
    checkpoint.save(folder, net, optimizer)
    tensors = {n: torch.empty(info.shape, dtype=info.dtype) for n, info in stored_tensors(folder).items()}
    read_tensors(tensors, folder)
    return net, optimizer, tensors


@pytest.mark.fast
def test_verify_finds_nothing_wrong_with_a_good_checkpoint(tmp_path: Path) -> None:
    net, optimizer, _ = saved(tmp_path / "c")
    assert checkpoint.verify(tmp_path / "c", net, optimizer) == ()
    assert checkpoint.verify(tmp_path / "none", net)[0].endswith("none holds no checkpoint: its .metadata is missing")


UP3, UP4, MOMENT = "first.experts.3.up", "first.experts.4.up", "optimizer.last.experts.2.down.exp_avg"


def lost(tensors: dict[str, Tensor]) -> None:
    del tensors[f"model.{UP3}"]


def doubled(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{UP3}"] = tensors[f"model.{UP4}"]


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{UP3}"] = tensors[f"model.{UP3}"].T.contiguous()


def one_too_many(tensors: dict[str, Tensor]) -> None:
    tensors["model.first.experts.6.up"] = tensors[f"model.{UP3}"]


def no_moment(tensors: dict[str, Tensor]) -> None:
    del tensors[MOMENT]


def other_step(tensors: dict[str, Tensor]) -> None:
    tensors["optimizer.first.experts.3.up.step"] = torch.tensor(9.0)


def flipped(tensors: dict[str, Tensor]) -> None:
    tensors[MOMENT][0, 0] += 1


@pytest.mark.fast
@pytest.mark.parametrize(
    "spoil, found, fits",
    [
        (lost, f"{UP3} is missing", False),
        (doubled, f"model.{UP3} holds what was saved as model.{UP4}", True),
        (transposed, f"{UP3} has shape [6, 8], the model's has [8, 6]: it is transposed", False),
        (one_too_many, "first.experts.6.up is not of this model", False),
        (no_moment, f"{MOMENT} is missing", False),
        (other_step, "first.experts.3.up.step does not hold the bytes that were saved", False),
        (flipped, f"{MOMENT} does not hold the bytes that were saved", True),
    ],
)
def test_what_is_wrong_with_an_expert_is_named(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], found: str, fits: bool
) -> None:
    """fits: the shapes do, so that loading, which reads no more than it needs, cannot tell; verify can."""
    net, optimizer, tensors = saved(tmp_path / "good")
    spoil(tensors)
    write_tensors(tensors, tmp_path / "bad", ALONE)
    assert any(found in fault for fault in checkpoint.verify(tmp_path / "bad", net, optimizer))
    if fits:
        return
    before = whole(net, optimizer)
    with pytest.raises(ValueError) as error:
        checkpoint.load(tmp_path / "bad", net, optimizer)
    expected = "have step [2.0, 9.0], not one" if spoil is other_step else found
    assert expected in str(error.value)
    assert_same(whole(net, optimizer), before)


@pytest.mark.fast
def test_a_square_weight_that_was_transposed_is_found_by_its_bytes(tmp_path: Path) -> None:
    net, optimizer, tensors = saved(tmp_path / "good")
    tensors["model.middle.weight"] = tensors["model.middle.weight"].T.contiguous()
    write_tensors(tensors, tmp_path / "bad", ALONE)
    assert checkpoint.verify(tmp_path / "bad", net, optimizer) == ("model.middle.weight is transposed",)


@pytest.mark.fast
def test_other_models_other_optimisers_and_folders_in_use_are_refused(tmp_path: Path) -> None:
    net, optimizer, _ = saved(tmp_path / "c")
    with pytest.raises(ValueError, match="c is there already; give a folder that is not"):
        checkpoint.save(tmp_path / "c", net)
    two = AdamW([{"params": [net.middle.weight]}, {"params": [net.middle.bias]}])
    with pytest.raises(ValueError, match=r"had 1 groups of parameters, this one has 2|is not of this optimiser"):
        checkpoint.load(tmp_path / "c", net, two)
    checkpoint.save(tmp_path / "weights", net)
    with pytest.raises(ValueError, match="holds nothing of an optimiser; load the model alone"):
        checkpoint.load(tmp_path / "weights", net, optimizer)
    other = Net(MoEConfig(dim=6, hidden=5, num_experts=6, top_k=2, bias=True))
    with pytest.raises(ValueError, match=r"does not fit: .*; and \d+ more"):
        checkpoint.load(tmp_path / "weights", other)
    write_tensors({"x": torch.zeros(2)}, tmp_path / "foreign", ALONE)
    with pytest.raises(ValueError, match=r"foreign was not written by moe\.checkpoint"):
        checkpoint.load(tmp_path / "foreign", net)


@pytest.mark.fast
def test_prices_of_one_balancer_start_another(tmp_path: Path) -> None:
    """As with state dicts: the prices travel, the statistics of another balancer's step do not."""
    net, _, _ = saved(tmp_path / "c")
    plain = Net(MoEConfig(dim=6, hidden=4, num_experts=6, top_k=2, bias=True, shared_hidden=3))
    checkpoint.load(tmp_path / "c", plain)
    assert torch.equal(plain.first.router.price_E, net.first.router.price_E)
    assert plain.first.router.step == 2


def test_a_checkpoint_that_misses_an_expert_is_the_same_error_on_every_rank(world: Worlds, tmp_path: Path) -> None:
    _, _, tensors = saved(tmp_path / "good")
    lost(tensors)
    write_tensors(tensors, tmp_path / "bad", ALONE)
    messages = world(3).run(_refused, f"{tmp_path}/bad")
    assert len(set(messages)) == 1
    assert f"{UP3} is missing" in messages[0]


def _refused(folder: str) -> str:
    net = Net()
    with pytest.raises(ValueError) as error:
        checkpoint.load(folder, net, optimizer_of(net))
    return str(error.value)


def test_ranks_that_disagree_about_the_placement_save_nothing(world: Worlds, tmp_path: Path) -> None:
    messages = world(2).run(_disagree, f"{tmp_path}/c")
    assert all("are at home on [0, 2, 0, 2, 0, 2] ranks" in message for message in messages)
    assert not (tmp_path / "c").exists()


def _disagree(folder: str) -> str:
    net = Net()
    if Peers.of(world_group()).rank == 0:
        swapped = Placement(expert_RS=net.first.placement.expert_RS[::-1])
        net.first.placement = swapped
        net.first.experts.expert_ids = tuple(swapped.experts_of(0).tolist())
    with pytest.raises(ValueError) as error:
        checkpoint.save(folder, net)
    return str(error.value)


@pytest.mark.fast
def test_what_is_known_of_a_checkpoint_is_json(tmp_path: Path) -> None:
    _, _, tensors = saved(tmp_path / "c")
    about = json.loads(bytes(tensors["about"].tolist()))
    assert about["schema"] == "evenmoe.checkpoint/1"
    assert about["groups"][0]["weight_decay"] == 0.1
    assert set(about["checks"]) == tensors.keys() - {"about"}
