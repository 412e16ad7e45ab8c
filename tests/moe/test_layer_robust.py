"""Bad input is one clear error on every rank; modes of torch, deterministic runs and the budget of host syncs."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from moe import MoE, MoEConfig, World, average_expert_grads, leave_experts_alone
from moe.comm import world_group
from routing import Assigner, AtHome, Bip, LeastLoaded
from tests.world import tokens

LEAST = LeastLoaded(headroom=1.0)
Worlds = Callable[[int], World]


def layer_of(assigner: Assigner = LEAST, dtype: torch.dtype = torch.float64, **more: Any) -> MoE:
    torch.manual_seed(0)
    settings = {"dim": 6, "hidden": 8, "num_experts": 6, "top_k": 2, "assigner": assigner} | more
    return MoE(MoEConfig(**settings), world_group(), dtype=dtype)


def my_tokens(count: int = 16, skew: float = 5.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return tokens(6, (count,) * dist.get_world_size(), skew, dtype)[dist.get_rank()]


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_logits_raise_the_same_error_on_every_rank(world: Worlds, bad: float) -> None:
    messages = world(3).run(_nonfinite, bad)
    assert len(set(messages)) == 1
    assert "2 tokens" not in messages[0]
    assert "[1, 1] tokens on ranks [1, 2]" in messages[0]


def _nonfinite(bad: float) -> str:
    layer, x = layer_of(), my_tokens()
    if dist.get_rank():
        x[3, 2] = bad
    message = error_of(lambda: layer(x))
    assert layer(my_tokens()).isfinite().all(), "the group still works afterwards"
    return message


def test_nonfinite_padding_does_no_harm(world: Worlds) -> None:
    world(2).run(_nonfinite_padding)


def _nonfinite_padding() -> None:
    layer, x = layer_of(shared_hidden=4), my_tokens()
    valid = torch.ones(len(x), dtype=torch.bool)
    x[3], valid[3] = float("nan"), False
    y = layer(x.requires_grad_(), valid)
    y.sum().backward()
    assert torch.equal(y[3], torch.zeros(6, dtype=torch.float64))
    assert y.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("what", ["width", "dtype", "valid"])
def test_bad_input_on_one_rank_stops_all_of_them(world: Worlds, what: str) -> None:
    messages = world(3).run(_bad_input, what)
    assert all(message.startswith("bad input on rank 1: ") for message in messages)
    expected = {"width": r"[..., 6]; got [16, 5]", "dtype": "torch.float32", "valid": "valid must be bool"}[what]
    assert expected in messages[1]


def _bad_input(what: str) -> str:
    layer, x, valid = layer_of(), my_tokens(), None
    if dist.get_rank() == 1:
        x = {"width": x[:, :5], "dtype": x.float(), "valid": x}[what]
        valid = torch.ones(len(x)) if what == "valid" else None
    message = error_of(lambda: layer(x, valid))
    layer(my_tokens())
    return message


def test_nan_in_an_unused_expert_reaches_no_output_and_no_gradient(world: Worlds) -> None:
    world(2).run(_poisoned)


def _poisoned() -> None:
    layer, x = layer_of(top_k=1), my_tokens(skew=20.0)
    counts: list[Any] = []
    layer.observe(lambda choice, assignment: counts.append(assignment.count_RE.sum(axis=0)))
    layer(x)
    unused = [e for e in layer.experts.expert_ids if counts[0][e] == 0]
    assert unused
    with torch.no_grad():
        for slot, expert in enumerate(layer.experts.expert_ids):
            if expert in unused:
                layer.experts.up[slot] = float("nan")
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("mode", ["no_grad", "inference", "frozen experts", "no input gradient on one rank", "eval"])
def test_every_mode_of_torch_works_on_every_rank(world: Worlds, mode: str) -> None:
    world(3).run(_in_mode, mode)


def _in_mode(mode: str) -> None:
    layer, x = layer_of(), my_tokens()
    want = layer(x).detach()
    if mode == "no_grad":
        with torch.no_grad():
            assert torch.equal(layer(x), want)
    elif mode == "inference":
        with torch.inference_mode():
            assert torch.equal(layer(x), want)
    elif mode == "eval":
        assert torch.equal(layer.eval()(x), want)
    elif mode == "frozen experts":
        layer.experts.requires_grad_(False)
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        assert layer.experts.up.grad is None
    else:
        x.requires_grad_(dist.get_rank() != 1)
        layer(x).sum().backward()
        assert layer.experts.up.grad is not None


@pytest.mark.parametrize("assigner", [AtHome(), LEAST], ids=["home", "least"])
def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(world: Worlds, assigner: Assigner) -> None:
    world(2).run(_autocast, assigner)


def _autocast(assigner: Assigner) -> None:
    layer, x = layer_of(assigner, torch.float32, hidden=8, bias=True), my_tokens(dtype=torch.float32)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).abs().max() < 0.02 * want.abs().max()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_two_runs_agree_to_the_bit_and_so_do_the_plans_of_all_ranks(world: Worlds) -> None:
    first, second = world(4).run(_fingerprint, 5.0), world(4).run(_fingerprint, 5.0)
    assert first == second
    assert len({plans for plans, _ in first}) == 1


def _fingerprint(skew: float, assigner: Assigner = LEAST) -> tuple[str, str]:
    layer, plans = layer_of(assigner), hashlib.sha256()
    layer.observe(lambda choice, assignment: plans.update(assignment.quota_RE.tobytes()))
    x = my_tokens(skew=skew).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    values = [y, x.grad, *(p.grad for p in layer.parameters())]
    return plans.hexdigest(), hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in values)).hexdigest()  # type: ignore[union-attr]


def test_least_loaded_in_balance_is_at_home_to_the_bit(world: Worlds) -> None:
    slack = LeastLoaded(headroom=2.9)
    assert world(3).run(_fingerprint, 0.0, slack) == world(3).run(_fingerprint, 0.0, AtHome())


class CountSyncs(TorchDispatchMode):
    """Operations that make the host wait for a device, or have a shape that only the device knows."""

    SYNCS = frozenset(
        {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select", "aten::bincount"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in self.SYNCS:
            self.syncs.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_forward_waits_for_the_device_once(world: Worlds, padded: bool) -> None:
    """Nothing reads a value of a tensor, nothing has a shape that depends on one; only gather_counts brings counts."""
    assert world(2).run(_syncs, padded) == [([], 1)] * 2


def _syncs(padded: bool) -> tuple[list[str], int]:
    """(what waited, how often counts were gathered). A Tensor's ways to the host are counted outside gather_counts."""
    import moe.layer

    layer, x = layer_of(dtype=torch.float32, hidden=8, bias=True, shared_hidden=4), my_tokens(dtype=torch.float32)
    valid = torch.arange(len(x)) % 3 > 0 if padded else None
    gathered: list[int] = []
    waited: list[str] = []
    real_gather, inside = moe.layer.gather_counts, [False]

    def gather(*args: Any) -> Any:
        gathered.append(1)
        inside[0] = True
        try:
            return real_gather(*args)
        finally:
            inside[0] = False

    def noisy(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not inside[0]:
                waited.append(name)
            return real(*args, **kwargs)

        return call

    ways = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")
    with pytest.MonkeyPatch.context() as patch, CountSyncs() as counter:
        patch.setattr(moe.layer, "gather_counts", gather)
        for way in ways:
            patch.setattr(torch.Tensor, way, noisy(way, getattr(torch.Tensor, way)))
        layer(x.requires_grad_(), valid).sum().backward()
    return waited + counter.syncs, len(gathered)


def test_rows_in_and_out_of_every_collective_equal_the_plan(world: Worlds) -> None:
    for sent, want in world(3).run(_collectives):
        assert sent == want


def _collectives() -> tuple[list[Any], list[Any]]:
    """(rows sent, rows received) of each all-to-all: tokens, then weights out, results home; and back in backward."""
    layer, x = layer_of(top_k=1), my_tokens(skew=20.0).requires_grad_()
    plans: list[Any] = []
    layer.observe(lambda choice, assignment: plans.append(assignment))
    calls: list[Any] = []
    real = dist.all_to_all_single

    def logged(out: Tensor, source: Tensor, recv: list[int], send: list[int], **others: Any) -> Any:
        assert (len(source), len(out)) == (sum(send), sum(recv))
        calls.append((send, recv))
        return real(out, source, recv, send, **others)

    dist.all_to_all_single = logged
    try:
        layer(x).sum().backward()
    finally:
        dist.all_to_all_single = real
    rank, flow_RR = dist.get_rank(), plans[0].flow_RRE().sum(axis=-1)
    flow_RR[range(3), range(3)] = 0  # rows that stay are not sent
    loans = plans[0].loans(layer.placement)
    lent = [sum(loan.lender == rank and loan.borrower == other for loan in loans) for other in range(3)]
    borrowed = [sum(loan.borrower == rank and loan.lender == other for loan in loans) for other in range(3)]
    assert loans
    tokens_out = (flow_RR[rank].tolist(), flow_RR[:, rank].tolist())
    forward = [tokens_out, (lent, borrowed), tokens_out[::-1]]
    backward = [tokens_out, (borrowed, lent), tokens_out[::-1]]
    return calls, forward + backward


def test_ddp_around_experts_trains_like_one_process(world: Worlds) -> None:
    """Three steps of SGD on 4 ranks, in two expert-parallel groups of two, and on one."""
    together, alone = world(4).run(_train), world(1).run(_train)
    for rank, weights in enumerate(together):
        for name, weight in weights.items():
            assert torch.allclose(weight, alone[0][name], rtol=0, atol=1e-12), f"rank {rank}: {name}"


class Net(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6, dtype=torch.float64)
        self.layer = MoE(MoEConfig(dim=6, hidden=8, num_experts=6, top_k=2, assigner=LEAST), group, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


def _train() -> dict[str, Tensor]:
    """The loss is the mean over all tokens; each rank takes a quarter of them, in two micro-batches."""
    size, rank = dist.get_world_size(), dist.get_rank()
    experts = [dist.new_group([0, 1]), dist.new_group([2, 3])] if size == 4 else [None]
    twins = [dist.new_group([0, 2]), dist.new_group([1, 3])] if size == 4 else [None]
    net = Net(experts[rank // 2 % len(experts)])
    model = DistributedDataParallel(leave_experts_alone(net)) if size == 4 else net
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    x_all = torch.cat(tokens(6, (8, 8, 8, 8), 1.0, torch.float64))
    x = x_all[rank * 32 // size : (rank + 1) * 32 // size]
    for _ in range(3):
        optimiser.zero_grad()
        for part in x.chunk(2):
            (model(part).square().sum(dim=-1).mean() / 2).backward()
        if size == 4:
            average_expert_grads(net, dist.group.WORLD, replicas=twins[rank % 2])
        optimiser.step()
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if "experts" not in name}
    for expert, state in net.layer.expert_state().items():
        weights |= {f"{expert}.{name}": value.clone() for name, value in state.items()}
    return weights


@pytest.mark.fast
def test_expert_state_moves_between_any_two_layouts_or_not_at_all() -> None:
    torch.manual_seed(1)
    settings = MoEConfig(dim=6, hidden=8, num_experts=6, top_k=2, bias=True)
    one, other = MoE(settings), MoE(settings)
    state = one.expert_state()
    other.load_expert_state(state)
    assert all(torch.equal(a, b) for a, b in zip(one.experts.parameters(), other.experts.parameters()))
    before = [p.clone() for p in other.experts.parameters()]
    broken = copy.deepcopy(state)
    for tensor in broken[0].values():
        tensor.zero_()
    del broken[5]["down"]
    with pytest.raises(ValueError, match="no 'down' of expert 5"):
        other.load_expert_state(broken)
    broken[5]["down"] = torch.zeros(6, 9)
    with pytest.raises(ValueError, match=r"'down' of expert 5 has shape \[6, 9\]; the layer has \[6, 8\]"):
        other.load_expert_state(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, other.experts.parameters()))


def test_initial_weights_depend_on_the_seed_and_the_experts_id_alone(world: Worlds) -> None:
    alone = world(1).run(_initial)[0]
    for ranks in (2, 4):
        merged: dict[int, dict[str, Tensor]] = {}
        for state in world(ranks).run(_initial):
            merged |= state
        assert merged.keys() == alone.keys()
        for expert, weights in alone.items():
            for name, weight in weights.items():
                assert torch.equal(merged[expert][name], weight)


def _initial() -> dict[int, dict[str, Tensor]]:
    layer = layer_of(bias=True, shared_hidden=4)
    state = {expert: {k: v.clone() for k, v in weights.items()} for expert, weights in layer.expert_state().items()}
    state[-1] = {name: p.detach().clone() for name, p in layer.named_parameters() if not name.startswith("experts")}
    return state


@pytest.mark.fast
def test_a_copy_of_a_layer_is_its_own_layer() -> None:
    layer = MoE(MoEConfig(dim=6, hidden=8, num_experts=6, top_k=2))
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x), twin(x))
    with torch.no_grad():
        twin.experts.up.zero_()
    assert not torch.equal(layer(x), twin(x))
    assert layer(x).shape == x.shape


@pytest.mark.fast
def test_an_observer_hears_until_it_is_removed() -> None:
    layer = MoE(MoEConfig(dim=6, hidden=8, num_experts=6, top_k=2))
    heard: list[int] = []
    handle = layer.observe(lambda choice, assignment: heard.append(int(assignment.count_RE.sum())))
    layer(torch.randn(5, 6))
    handle.remove()
    layer(torch.randn(5, 6))
    assert heard == [10]


@pytest.mark.fast
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 0}, "dim=0; use at least 1"),
        ({"top_k": 7}, "top_k=7 of 6 experts"),
        ({"shared_hidden": -1}, "shared_hidden=-1"),
        ({"top_k": 2.0}, "top_k=2.0; use a whole number"),
        ({"assigner": LeastLoaded}, r"LeastLoaded'> is no policy; use an object, such as AtHome\(\)"),
        ({"balancer": Bip}, r"Bip'> is no policy; use an object, such as Unpriced\(\)"),
        ({"balancer": "bip"}, "balancer='bip' is no policy"),
        ({"activation": "silu"}, "activation='silu' is no policy"),
    ],
)
def test_a_bad_config_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**({"dim": 6, "hidden": 8, "num_experts": 6, "top_k": 2} | change))


@pytest.mark.fast
def test_a_group_that_is_none_is_refused_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As dist.group.WORLD is before init_process_group."""
    config = MoEConfig(dim=6, hidden=8, num_experts=6, top_k=2)
    with pytest.raises(ValueError, match="group='world'; use a process group"):
        MoE(config, "world")  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="one of 2 processes .* call torch.distributed.init_process_group first"):
        MoE(config, dist.group.WORLD)


@pytest.mark.fast
def test_a_compiled_block_may_contain_the_layer() -> None:
    """The layer itself is left out of the graph; what surrounds it is compiled."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), MoE(MoEConfig(dim=6, hidden=8, num_experts=6, top_k=2)), nn.Tanh())
    compiled = torch.compile(block, backend="eager")
    x = torch.randn(5, 6)
    assert torch.equal(compiled(x), block(x))
