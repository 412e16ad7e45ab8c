"""Statistics count every token once, prices are settled once a step, and no host waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import settle_after, settle_prices, share_overflow
from routing import (
    Balancer,
    LossFree,
    Quantile,
    Router,
    Sparsify,
)
from tests.moe.priced import (
    BALANCERS,
    TOKENS,
    D,
    E,
    K,
    Net,
    batch,
    prices,
    statistics,
)
from tests.moe.test_layer_robust import CountSyncs
from tests.moe.test_recompute import KINDS, run


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_counted_once_however_activations_are_recomputed(kind: str) -> None:
    net = Net(Quantile())
    for part in batch().chunk(4):
        run(kind, net, part.clone().requires_grad_()).square().sum().backward()  # type: ignore[no-untyped-call]
    for stats in statistics(net):
        assert stats["tokens"] == TOKENS
        assert stats["load_E"].sum() == stats["kept_E"].sum() == TOKENS * K
        assert stats["margin_EB"].sum(dim=1).tolist() == [TOKENS] * E
        torch.testing.assert_close(stats["score_E"].sum(), torch.tensor(TOKENS, dtype=torch.float64))


@pytest.mark.fast
def test_evaluation_counts_nothing_and_padding_is_no_token() -> None:
    net, valid = Net(Quantile()), torch.arange(TOKENS) % 4 > 0
    net.eval()(batch())
    assert not any(stat.any() for stats in statistics(net) for stat in stats.values())
    net.train()
    net.first(batch().where(valid[:, None], torch.nan), valid)
    stats = net.first.router.stats
    assert stats["tokens"] == valid.sum()
    assert stats["load_E"].sum() == K * valid.sum()
    assert stats["margin_EB"].sum() == E * valid.sum()
    assert stats["score_E"].isfinite().all()


def skip_with_overflow(fused: bool) -> tuple[Net, list[int]]:
    """Three steps under a GradScaler, the second of which overflows. -> tokens in the statistics after each"""
    net = Net(LossFree(step=0.01)).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    settle_after(optimizer, net)
    left = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(net(batch().float()).square().mean() * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        left.append(int(net.first.router.stats["tokens"]))
    return net, left


@pytest.mark.fast
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_settles_nothing_and_its_statistics_count_in_the_next(fused: bool) -> None:
    net, left = skip_with_overflow(fused)
    assert left == [0, TOKENS, 0]
    assert [router.step for router in net.routers] == [2, 2]
    assert net.first.router.closed["tokens"] == 2 * TOKENS


@pytest.mark.fast
@pytest.mark.parametrize("bad", [0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_overflow_anywhere_is_one_in_the_first_gradient_and_no_host_waits(bad: float, dtype: torch.dtype) -> None:
    """Gradients may lie in memory in any order, and be none of some."""
    weights = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((0, 3), (2, 3), (), (5,), (4,))]
    for weight in weights[:4]:
        weight.grad = torch.full_like(weight, 6e4)  # its square is not finite in 16 bits
    weights[1].grad = torch.full((3, 2), 6e4, dtype=dtype).T
    weights[3].grad[4] += bad  # type: ignore[index]
    before = [None if weight.grad is None else weight.grad.clone() for weight in weights]
    with CountSyncs() as counter:
        share_overflow(torch.optim.SGD(weights))
    assert counter.syncs == []
    assert weights[1].grad.isfinite().all() == (bad == 0.0)  # type: ignore[union-attr]
    before[1][0, 0] = weights[1].grad[0, 0]  # type: ignore[index]
    for weight, was in zip(weights, before):
        torch.testing.assert_close(weight.grad, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.fast
@pytest.mark.parametrize("bad", [0.0, float("inf")])
def test_an_overflow_of_a_sparse_gradient_is_one_too(bad: float) -> None:
    """Its line that comes twice overflows in the sum alone."""
    table = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
    lines = torch.full((2, 2), 6e4 if bad else 1.0, dtype=torch.float16)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[3, 3]]), lines, (4, 2), check_invariants=True)
    share_overflow(torch.optim.SGD([table]))
    assert table.grad.to_dense()[3].isfinite().all() == (not bad)


@pytest.mark.fast
def test_who_has_no_gradient_to_tell_of_an_overflow_is_an_error() -> None:
    """torch's own scaler finds nothing in it and steps."""
    empty, without = torch.zeros(0, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    empty.grad = torch.zeros(0, 3)
    with pytest.raises(ValueError, match="no weight of this optimiser has a gradient here"):
        share_overflow(torch.optim.SGD([empty, without]))


@pytest.mark.fast
def test_an_optimizer_that_evaluates_its_closure_often_settles_once() -> None:
    net = Net(LossFree(step=0.01))
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1e-2, max_iter=3)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = net(batch()).square().mean()
        loss.backward()
        calls.append(1)
        return float(loss.detach())

    handle = settle_after(optimizer, net)
    optimizer.step(closure)
    assert len(calls) > 1
    assert net.first.router.step == 1
    assert net.first.router.closed["tokens"] == TOKENS * len(calls)
    handle.remove()
    optimizer.step(closure)
    assert net.first.router.step == 1


@pytest.mark.fast
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_a_step_without_tokens_leaves_the_prices(balancer: Balancer) -> None:
    net = Net(balancer)
    net(batch())
    settle_prices(net)
    before = prices(net)
    assert any(map(any, before))
    settle_prices(net)
    net(batch()[:0])
    settle_prices(net)
    assert prices(net) == before
    assert [router.step for router in net.routers] == [3, 3]


@pytest.mark.fast
def test_a_schedule_moves_on_with_every_settled_step() -> None:
    net = Net(Quantile(rounds=0), top_k=Sparsify(stages=((0, 4), (2, 1))))
    seen = []
    net.first.observe(lambda choice, assignment: seen.append(choice.k))
    for _ in range(3):
        net(batch())
        settle_prices(net)
    assert seen == [4, 4, 1]
    resumed = Net(Quantile(rounds=0), top_k=Sparsify(stages=((0, 4), (2, 1))))
    resumed.load_state_dict(net.state_dict())
    assert resumed.first.router.step == 3
    assert resumed.first.router.top_k == 1


@pytest.mark.fast
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_prices_never_make_the_host_wait(balancer: Balancer, padded: bool) -> None:
    """After the first step, which reads how many there were before."""
    router = Router(D, E, Sparsify(stages=((0, 2), (1, 1))), balancer=balancer)
    x, valid = batch().float(), torch.arange(TOKENS) % 3 > 0 if padded else None
    waited: list[str] = []

    def noisy(name: str) -> Callable[..., Any]:
        real = getattr(Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            waited.append(name)
            return real(*args, **kwargs)

        return call

    router.observe(router(x, valid))
    router.settle()
    with pytest.MonkeyPatch.context() as patch, CountSyncs() as counter:
        for way in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, way, noisy(way))
        for _ in range(2):
            choice = router(x, valid)
            choice.weight_N.sum().backward()
            router.observe(choice)
            router.settle()
    assert waited + counter.syncs == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False")
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_prices_never_make_the_host_wait_for_a_gpu(balancer: Balancer, padded: bool) -> None:
    router = Router(D, E, K, balancer=balancer, device="cuda")
    x, valid = batch().float().cuda(), (torch.arange(TOKENS) % 3 > 0).cuda() if padded else None
    router.observe(router(x, valid))
    router.settle()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            choice = router(x, valid)
            router.observe(choice)
            router.settle()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert router.step == 3
