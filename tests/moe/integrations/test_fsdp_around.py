"""What stands around a sharded model: checkpoints for any number of ranks, torch.compile, plans, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from moe import MoE, World, checkpoint, settle_prices
from moe.integrations.fsdp import ExpertParallel, in_order, parallelize_experts, shard
from placement import Placement
from tests.moe.integrations.sharded import (
    DIM,
    EXPERTS,
    Net,
    batch,
    config,
    full,
    layers_of,
    loss_of,
    meshes,
    sharded,
    whole_state,
)
from tests.world import run

Worlds = Callable[[int], World]
RANKS = 4


class Trained:
    """A model and its AdamW on the ranks there are; ep 0: whole, on one process."""

    def __init__(self, ep: int) -> None:
        net = Net(config())
        self.net = sharded(net, ep) if ep else net
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.mine = [dist.get_rank()] if ep else list(range(RANKS))

    def step(self, number: int) -> None:
        self.optimiser.zero_grad()
        for rank in self.mine:
            (loss_of(self.net, batch(rank, number)) / len(self.mine)).backward()
        self.optimiser.step()
        settle_prices(self.net)

    def state(self) -> dict[str, Any]:
        model, optimiser = get_state_dict(self.net, self.optimiser)
        return {"model": model, "optimiser": optimiser}

    def whole(self) -> dict[str, Tensor]:
        """Every tensor of model and optimiser, whole, by name."""
        model, optimiser = get_state_dict(self.net, self.optimiser)
        tensors = {name: full(value).clone() for name, value in model.items()}
        for weight, kept in optimiser["state"].items():
            tensors |= {f"{weight}.{key}": full(value).clone() for key, value in kept.items()}
        return tensors


def save(folder: str) -> dict[str, Tensor]:
    run = Trained(ep=4)
    for number in range(2):
        run.step(number)
    dcp.save(run.state(), checkpoint_id=folder)
    return run.whole()


def load(folder: str, ep: int) -> dict[str, Tensor]:
    run = Trained(ep)
    run.step(7)  # other weights, other moments
    state = run.state()
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(run.net, run.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    return run.whole()


def test_a_checkpoint_of_four_ranks_loads_on_any_with_its_optimiser(world: Worlds, tmp_path: Path) -> None:
    folder = str(tmp_path / "step2")
    saved = world(RANKS).run(save, folder)[0]
    assert saved["blocks.0.moe.experts.up"].shape[0] == EXPERTS
    assert saved["blocks.1.moe.experts.down.exp_avg_sq"].any()
    for ranks, ep in ((4, 4), (4, 2), (4, 1), (2, 2), (1, 0)):
        for loaded in world(ranks).run(load, folder, ep):
            assert loaded.keys() == saved.keys()
            for name, value in loaded.items():
                assert torch.equal(value, saved[name]), f"{name} on {ranks} ranks, EP {ep}"


def compiled(checkpointed: bool) -> tuple[dict[str, Tensor], int, int]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    net, graphs = Net(config()), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in net.blocks:
        block.compile(backend=count)
    sharded(net, 2)
    if checkpointed:
        net.run = partial(run, "non-reentrant")
    loss_of(net, batch(dist.get_rank()).requires_grad_()).backward()
    breaks = sum(counters["graph_break"].values())
    return {name: full(weight.grad) for name, weight in net.named_parameters()}, breaks, len(graphs)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "recomputed"])
def test_a_compiled_block_breaks_its_graph_once_at_the_layer(world: Worlds, checkpointed: bool) -> None:
    net = Net(config())
    for rank in range(RANKS):
        (loss_of(net, batch(rank)) / RANKS).backward()
    for grads, breaks, graphs in world(RANKS).run(compiled, checkpointed):
        assert (breaks, graphs) == (1, 2), "one break a block, a graph before it and one after; blocks share them"
        for name, weight in net.named_parameters():
            assert weight.grad is not None
            assert (grads[name] - weight.grad).abs().max() < 1e-5 * weight.grad.abs().max(), name


def planned(how: str) -> list[Any]:
    """-> outputs of this rank, the shape of a DTensor, the share of it here"""
    _, sparse = meshes(2)
    net = Net(config())
    if how == "plan":
        parallelize_module(net, sparse["ep"], {"blocks.*.moe": ExpertParallel()})
    elif how == "group":
        parallelize_experts(net, sparse["ep"].get_group())
    else:
        for block in net.blocks:
            torch.manual_seed(3)
            block.moe = MoE(config(), sparse["ep"], in_order(EXPERTS, 2))
        parallelize_experts(net, sparse["ep"])
    weight = layers_of(net)[0].experts.up
    return [net(batch(dist.get_rank())).detach(), tuple(weight.shape), tuple(weight.to_local().shape)]


@pytest.mark.parametrize("how", ["plan", "group", "made on the mesh"])
def test_experts_are_spread_by_plan_by_group_or_from_the_start(world: Worlds, how: str) -> None:
    net = Net(config())
    if how == "made on the mesh":
        for block in net.blocks:
            torch.manual_seed(3)
            block.moe = MoE(config())
    for rank, (out, shape, local) in enumerate(world(RANKS).run(planned, how)):
        assert torch.allclose(out, net(batch(rank)), atol=1e-5)
        assert shape == (EXPERTS, 24, DIM)
        assert local == (EXPERTS // 2, 24, DIM)


def from_meta(ep: int, experts: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        net = Net(config(experts=experts))
    sharded(net, ep)
    net.to_empty(device="cpu")
    for layer in layers_of(net):
        torch.manual_seed(5)
        layer.experts.reset_parameters()
        layer.router.reset_parameters()
    return {name: value for name, value in whole_state(net).items() if ".moe." in name and ".shared." not in name}


@pytest.mark.parametrize("ep, experts", [(1, 8), (2, 8), (4, 8), (2, 2)])
def test_a_model_made_on_meta_starts_with_the_experts_of_one_process(world: Worlds, ep: int, experts: int) -> None:
    """Its router is drawn by torch's rule for DTensors, which is its own."""
    layer = MoE(config(experts=experts))
    torch.manual_seed(5)
    layer.experts.reset_parameters()
    for state in world(RANKS).run(from_meta, ep, experts):
        for name, value in state.items():
            if ".experts." in name:
                assert torch.equal(value, layer.experts.get_parameter(name.rpartition(".")[2])), name
            elif name.endswith("router.weight"):
                assert 0.5 < value.std() * DIM**0.5 < 2
            else:
                assert not value.any(), name


def refusals() -> dict[str, str]:
    said: dict[str, str] = {}

    def refuse(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except ValueError as error:
            said[name] = str(error)

    world, sparse = meshes(2)
    refuse("plain", lambda: shard(Net(config()), mesh=world, expert_mesh=sparse["efsdp"]))
    refuse("none", lambda: parallelize_experts(nn.Linear(2, 2), sparse["ep"]))
    refuse("plan", lambda: parallelize_module(Net(config()), sparse["ep"], {"blocks.*": ExpertParallel()}))
    refuse("dealt", lambda: parallelize_experts(MoE(config(), sparse["ep"]), sparse["ep"]))
    net = parallelize_experts(Net(config()), sparse["ep"])
    refuse("twice", lambda: parallelize_experts(net, sparse["ep"]))
    refuse("sizes", lambda: shard(net, mesh=world, expert_mesh=world))
    refuse("two", lambda: parallelize_experts(Net(config()), sparse))
    refuse("checkpoint", lambda: checkpoint.save("nowhere", net))
    refuse("state", layers_of(net)[0].expert_state)  # type: ignore[arg-type]
    layer = layers_of(net)[0]  # type: ignore[arg-type]
    refuse("rehome", lambda: layer.rehome(in_order(EXPERTS, 2), dict(layer.experts.named_parameters())))
    one = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("efsdp", "ep"))
    double = parallelize_experts(Net(config(), torch.float64), one["ep"])
    refuse("divided", lambda: shard(double, mesh=world, expert_mesh=one["efsdp"]))
    return said


def test_what_does_not_fit_is_one_clear_error(world: Worlds) -> None:
    said = world(RANKS).run(refusals)[0]
    for name, words in {
        "plain": "2 of 2 MoE layers are plain tensors",
        "none": "Linear has no MoE layer of evenmoe's",
        "plan": "the plan gives it to a Block",
        "dealt": "rank 0 holds experts [0, 2, 4, 6]; a DTensor over 2 ranks wants [0, 1, 2, 3]",
        "twice": "blocks.0.moe: its experts are DTensors already",
        "sizes": "the mesh has 4 ranks; 2 that share experts times 4",
        "two": "one dimension",
        "checkpoint": "torch.distributed.checkpoint",
        "state": "torch.distributed.checkpoint",
        "rehome": "stay where they are",
        "divided": "reduce_dtype=torch.float32",
    }.items():
        assert words in said.get(name, ""), (name, said.get(name))


@pytest.mark.fast
def test_uneven_shards_are_named_with_the_issue_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"7 experts on 2 ranks: .*pytorch#160533.*plain parameters"):
        in_order(7, 2)
    assert in_order(6, 2) == Placement(expert_RS=in_order(6, 2).expert_RS)
    assert in_order(6, 2).expert_RS.tolist() == [[0, 1, 2], [3, 4, 5]]
