"""Balancing losses join the model's own at its scale, whatever that is, and owe nothing where nothing goes backward."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe import MoE, MoEConfig, World, average_expert_grads, census, charge, leave_experts_alone, settle_prices
from moe.comm import world_group
from routing import GlobalLoss, GShardLoss, Loss, SequenceLoss, Sigmoid, SwitchLoss, ZLoss
from tests.moe.test_recompute import KINDS, run

D, E, LENGTH, SEQUENCES = 6, 8, 8, 16
CONFIG = MoEConfig(dim=D, hidden=4, num_experts=E, top_k=2, score=Sigmoid())
GLOBAL, SEQUENCE, Z = GlobalLoss(coefficient=0.3), SequenceLoss(coefficient=0.2), ZLoss(coefficient=0.1)
SWITCH = SwitchLoss(coefficient=0.3)
Worlds = Callable[[int], World]
Grads = dict[str, Tensor]


class Net(nn.Module):
    """Two layers whose balancing losses meet in one router's gradient."""

    def __init__(self, losses: tuple[Loss, ...], group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = replace(CONFIG, losses=losses)
        self.first, self.second = (MoE(config, group, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        y = x + self.first(x, valid)
        return y + self.second(y, valid)  # type: ignore[no-any-return]


def batch(sequences: int = SEQUENCES, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pull = torch.randn(D, generator=generator, dtype=torch.float64)
    return torch.randn(sequences, LENGTH, D, generator=generator, dtype=torch.float64) + pull


def own_loss(y: Tensor) -> Tensor:
    return y.square().sum(dim=-1).mean()


def grads_of(model: nn.Module, *, named: str = "router") -> Grads:
    return {name: p.grad.clone() for name, p in model.named_parameters() if named in name and p.grad is not None}


def assert_alike(got: Grads, want: Grads, rtol: float = 1e-9) -> None:
    assert got.keys() == want.keys()
    assert want
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=rtol, atol=rtol * float(grad.abs().max()), msg=name)


@pytest.mark.fast
@pytest.mark.parametrize("losses", [(SWITCH,), (SEQUENCE, Z), (GLOBAL,), (GShardLoss(coefficient=0.3), Z)], ids=str)
def test_a_charged_loss_has_the_value_and_the_gradient_of_the_sum_written_out(losses: tuple[Loss, ...]) -> None:
    net, plain, x = Net(losses), Net(()), batch()
    own = own_loss(net(x))
    charged = charge(net, own)
    charged.backward()  # type: ignore[no-untyped-call]

    terms: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, choice: Any) -> None:
        terms.extend(loss(choice, choice.load_E).mean() for loss in losses)

    for layer in (plain.first, plain.second):
        layer.router.register_forward_hook(note)
    own_again = own_loss(plain(x))
    whole = own_again + torch.stack(terms).sum()
    whole.backward()
    torch.testing.assert_close(charged, whole)
    assert charged > own
    assert_alike(grads_of(net, named=""), grads_of(plain, named=""))


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_same_however_activations_are_recomputed(kind: str) -> None:
    want, net = Net((GLOBAL, SEQUENCE, Z)), Net((GLOBAL, SEQUENCE, Z))
    for model, how in ((want, "none"), (net, kind)):
        for part in batch().chunk(2):
            (charge(model, own_loss(run(how, model, part.clone().requires_grad_()))) / 2).backward()  # type: ignore[no-untyped-call]
    assert_alike(grads_of(net, named=""), grads_of(want, named=""), rtol=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.parametrize("losses", [(GLOBAL,), (SEQUENCE, Z)], ids=["global", "sequence and z"])
def test_the_gradient_is_that_of_one_big_batch(world: Worlds, losses: tuple[Loss, ...], micro_batches: int) -> None:
    """Four ranks under DDP with all experts each, or sharing them; one rank; one batch, or eight."""
    (want,) = world(1).run(_gradients, losses, 1, "alone")
    runs = [world(1).run(_gradients, losses, micro_batches, "alone")]
    runs += [world(4).run(_gradients, losses, micro_batches, how) for how in ("replicas", "sharded")]
    for grads_R in runs:
        for grads in grads_R:
            assert_alike(grads, want, rtol=1e-5)


def _gradients(losses: tuple[Loss, ...], micro_batches: int, how: str) -> Grads:
    """The loss is a mean over this rank's tokens, averaged over micro-batches; DDP averages over ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = Net(losses, world_group() if how == "sharded" else None)
    model: nn.Module = net if how == "alone" else DistributedDataParallel(leave_experts_alone(net))
    parts = batch(32)[rank::size].chunk(micro_batches)
    with census(net):
        for part in parts:
            net(part)
    for part in parts:
        (charge(net, own_loss(model(part))) / micro_batches).backward()  # type: ignore[no-untyped-call]
    if how != "alone":
        average_expert_grads(net, world_group(), replicas=world_group() if how == "replicas" else None)
    return grads_of(net)


def test_the_switch_loss_is_that_of_one_big_batch_where_batches_are_alike(world: Worlds) -> None:
    (want,) = world(1).run(_alike, 1)
    for ranks in (1, 4):
        for grads in world(ranks).run(_alike, 8):
            assert_alike(grads, want, rtol=1e-5)


def _alike(micro_batches: int) -> Grads:
    net = Net((SWITCH,))
    model: nn.Module = DistributedDataParallel(leave_experts_alone(net))
    for _ in range(micro_batches):
        (charge(net, own_loss(model(batch()))) / micro_batches).backward()  # type: ignore[no-untyped-call]
    return grads_of(net)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_loss_over_shards_of_the_tokens_is_charged_over_all_of_them(world: Worlds, ranks: int) -> None:
    """Sequence parallelism: each rank has part of the tokens, uneven ones, and gradients are summed."""
    (want,) = world(1).run(_sharded)
    for grads in world(ranks).run(_sharded):
        assert_alike(grads, want, rtol=1e-5)


def _sharded() -> Grads:
    rank, size = dist.get_rank(), dist.get_world_size()
    net, x = Net((GLOBAL, Z), world_group()), batch().flatten(0, 1)
    cuts = [0, *(len(x) * part // size - 3 for part in range(1, size)), len(x)]
    own = x[cuts[rank] : cuts[rank + 1]]
    with census(net):
        net(own)
    charge(net, net(own).square().sum() / len(x), tokens=len(x)).backward()  # type: ignore[no-untyped-call]
    grads = grads_of(net)
    for grad in grads.values():
        dist.all_reduce(grad)
    return grads


@pytest.mark.fast
@pytest.mark.parametrize("rubbish", [0.0, 1e3, float("nan")])
def test_what_padding_holds_reaches_no_gradient(rubbish: float) -> None:
    losses = (GLOBAL, SEQUENCE, Z, SWITCH)
    valid = (torch.arange(LENGTH) < 6).expand(SEQUENCES, LENGTH)
    padded, short = Net(losses), Net(losses)
    y = padded(batch().where(valid[..., None], rubbish), valid)
    charge(padded, y[valid].square().sum(dim=-1).mean()).backward()  # type: ignore[no-untyped-call]
    charge(short, own_loss(short(batch()[:, :6]))).backward()  # type: ignore[no-untyped-call]
    assert_alike(grads_of(padded, named=""), grads_of(short, named=""))


@pytest.mark.fast
def test_whatever_scales_the_loss_scales_the_levy() -> None:
    plain, scaled = Net((GLOBAL, Z)), Net((GLOBAL, Z))
    charge(plain, own_loss(plain(batch()))).backward()  # type: ignore[no-untyped-call]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(charge(scaled, own_loss(scaled(batch())))).backward()  # type: ignore[no-untyped-call]
    grads = {name: grad / 1024 for name, grad in grads_of(scaled, named="").items()}
    assert_alike(grads, grads_of(plain, named=""), rtol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_a_levy_that_was_not_charged_is_one_clear_error(kind: str) -> None:
    net = Net((SWITCH,))
    loss = own_loss(run(kind, net, batch().requires_grad_()))
    with pytest.raises(RuntimeError, match=r"say `loss = charge\(model, loss\)` before"):
        loss.backward()


@pytest.mark.fast
def test_two_forwards_share_one_charge() -> None:
    """Whatever their sizes, if the number of tokens is told; and the next charge finds nothing."""
    x = batch()
    one, two = Net((SEQUENCE, Z)), Net((SEQUENCE, Z))
    whole = charge(one, own_loss(one(x)))
    sizes = [SEQUENCES // 4, SEQUENCES - SEQUENCES // 4]
    own = torch.cat([two(part) for part in x.split(sizes)]).square().sum(dim=-1).mean()
    loss = charge(two, own, tokens=SEQUENCES * LENGTH)
    assert charge(two, own) is own
    torch.testing.assert_close(loss, whole)
    torch.stack([whole, loss]).sum().backward()
    assert_alike(grads_of(two, named=""), grads_of(one, named=""))


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "thrown away", "census", "reentrant no_grad"])
def test_forwards_that_do_not_go_backward_owe_nothing_and_leave_nothing(mode: str) -> None:
    net, x = Net((GLOBAL, Z)), batch()
    for _ in range(5):
        if mode == "eval":
            net.eval()(x)
        elif mode == "no_grad":
            with torch.no_grad():
                net(x)
        elif mode == "inference":
            with torch.inference_mode():
                net(x)
        elif mode == "census":
            with census(net):
                net(x)
        elif mode == "reentrant no_grad":
            with torch.no_grad():
                run("reentrant", net, x)
        else:
            net(x)
    gc.collect()
    net.train()
    own = own_loss(x)
    assert charge(net, own) is own
    settle_prices(net)
    fresh = Net((GLOBAL, Z))
    torch.testing.assert_close(charge(net, own_loss(net(x))), charge(fresh, own_loss(fresh(x))))
    assert len(net.first.levies._open) == 0


@pytest.mark.fast
def test_a_copy_owes_nothing() -> None:
    net, x, file = Net((Z,)), batch(), io.BytesIO()
    y = net(x)
    copied = copy.deepcopy(net)
    torch.save(net, file)
    file.seek(0)
    own = own_loss(y)
    for other in (copied, torch.load(file, weights_only=False)):
        assert charge(other, own) is own
        other(x)
    charge(net, own).backward()  # type: ignore[no-untyped-call]
    assert net.first.router.weight.grad is not None


@pytest.mark.fast
def test_the_share_is_what_the_levies_of_a_layer_are_of_the_whole_loss() -> None:
    net = Net((SWITCH, Z))
    own = own_loss(net(batch()))
    whole = charge(net, own)
    shares = [layer.levies.share for layer in (net.first, net.second)]
    assert shares[0] is not None
    assert shares[1] is not None
    torch.testing.assert_close(shares[0] + shares[1], (whole - own) / whole)
    assert not shares[0].requires_grad
    parts = [net.first(part) for part in batch().chunk(2)]
    own = own_loss(torch.cat(parts))
    whole = charge(net, own, tokens=SEQUENCES * LENGTH)
    torch.testing.assert_close(net.first.levies.share, (whole - own) / whole)


@pytest.mark.fast
def test_charge_says_what_it_cannot_charge() -> None:
    net = Net((Z,))
    with pytest.raises(ValueError, match=r"got shape \[16, 8\]"):
        charge(net, net(batch()).sum(dim=-1))
    with pytest.raises(ValueError, match="tokens=0"):
        charge(net, own_loss(net(batch())), tokens=0)
