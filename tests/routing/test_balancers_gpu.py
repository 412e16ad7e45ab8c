"""Balancers on a GPU: the prices a CPU finds, and the host is not waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from routing.balancer import Balancer
from tests.routing.scored import choose, observed, popular, quoted
from tests.routing.test_balancers import BALANCERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Whoever makes the host wait for the device fails, and whoever may answer differently the next time."""
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padding"])
@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_quote_observe_and_settle_do_not_wait(balancer: Balancer, masked: bool) -> None:
    score_TE, price_E, settled = popular(512, 16).float().cuda(), torch.zeros(16).cuda(), torch.zeros(()).cuda()
    valid_T = (torch.arange(512) % 5 > 0).cuda() if masked else None
    choice = choose(score_TE, price_E, 4, valid_T)
    on_cpu = observed(balancer, [choose(score_TE.cpu(), price_E.cpu(), 4)], price_E.cpu())
    stats = {name: value.cuda() for name, value in on_cpu.items()}
    with nobody_waits():
        balancer.quote(score_TE, price_E, 4, valid_T=valid_T, settled=settled)
        balancer.observe(choice, price_E)
        after_E = balancer.settle(price_E, stats, 4, settled=settled)
    want_E = balancer.settle(price_E.cpu(), on_cpu, 4, settled=settled.cpu())
    torch.testing.assert_close(after_E.cpu(), want_E, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
def test_a_gpu_quotes_what_a_cpu_does(balancer: Balancer) -> None:
    score_TE, price_E = popular(512, 16), torch.linspace(0, 0.05, 16)
    on_gpu_E = balancer.quote(
        score_TE.cuda(), price_E.cuda(), 4, valid_T=None, settled=torch.zeros((), dtype=torch.int64).cuda()
    )
    torch.testing.assert_close(on_gpu_E.cpu(), quoted(balancer, score_TE, 4, price_E), rtol=1e-5, atol=1e-6)
