"""One contract for every Balancer, run by test_balancers on all of them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from routing import Choice
from routing.balancer import Balancer
from tests.routing.scored import NO_STEPS, choose, observed, popular, quoted, step

T, E, K = 96, 12, 3
CALMLY = torch.linspace(0.01, 0.05, E)  # standing prices


def batch(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return popular(T, E, seed, "sigmoid").to(dtype)


def check_quote_reads_only(balancer: Balancer) -> None:
    """It writes into nothing it is given, answers alike twice, and its answer has no gradient."""
    score_TE, price_E, valid_T = batch().requires_grad_(), CALMLY.clone(), torch.arange(T) % 5 > 0
    before = score_TE.detach().clone()
    for valid in (None, valid_T):
        first_E, again_E = (quoted(balancer, score_TE, K, price_E, valid) for _ in range(2))
        assert torch.equal(first_E, again_E)
        assert not first_E.requires_grad
    assert torch.equal(score_TE, before)
    assert torch.equal(price_E, CALMLY)
    assert torch.equal(valid_T, torch.arange(T) % 5 > 0)


def check_prices_are_fp32_or_better(balancer: Balancer) -> None:
    """Quotes are finite in fp32 or fp64, whichever the scores are; standing prices stay what they are."""
    for dtype in (torch.float32, torch.float64):
        score_TE = batch(dtype)
        quoted_E = quoted(balancer, score_TE, K, CALMLY)
        assert quoted_E.shape == (E,)
        assert quoted_E.dtype in (torch.float32, dtype)
        assert quoted_E.isfinite().all()
        settled_E, _ = step(balancer, [score_TE], CALMLY, K)
        assert settled_E.dtype == torch.float32
        assert settled_E.shape == (E,)


def check_padding_takes_no_part(balancer: Balancer) -> None:
    """Whatever padding holds, NaN included, and wherever it is, the prices are those of the tokens alone."""
    score_TE, valid_T = batch(), torch.arange(T) % 5 > 0
    alone_E = quoted(balancer, score_TE[valid_T], K, CALMLY)
    alone, price_E = choose(score_TE[valid_T], alone_E, K), CALMLY
    for rubbish in (0.0, 1e9, -1e9, float("nan"), float("inf")):
        padded_TE = score_TE.where(valid_T[:, None], rubbish)
        padded_E = quoted(balancer, padded_TE, K, CALMLY, valid_T)
        torch.testing.assert_close(padded_E, alone_E, rtol=1e-6, atol=1e-7)
        padded = choose(padded_TE, alone_E, K, valid_T)
        for name, value in observed(balancer, [padded], price_E).items():
            torch.testing.assert_close(value, observed(balancer, [alone], price_E)[name], rtol=1e-12, atol=1e-12)


def check_order_of_tokens_is_nothing(balancer: Balancer) -> None:
    score_TE = batch()
    shuffled_TE = score_TE[torch.randperm(T, generator=torch.Generator().manual_seed(0))]
    first_E, other_E = (quoted(balancer, each_TE, K, CALMLY) for each_TE in (score_TE, shuffled_TE))
    torch.testing.assert_close(other_E, first_E, rtol=1e-6, atol=1e-7)


def check_statistics_add_up(balancer: Balancer) -> None:
    """At one price, what the parts of a batch add is what the whole adds: to the bit if it is counts."""
    for dtype in (torch.float32, torch.float64):
        score_TE = batch(dtype)
        whole = observed(balancer, [choose(score_TE, CALMLY, K)], CALMLY)
        for sizes in ([T // 8] * 8, [1, 0, 50, T - 51]):
            parts = observed(balancer, [choose(part_TE, CALMLY, K) for part_TE in score_TE.split(sizes)], CALMLY)
            for name, value in whole.items():
                if torch.equal(value, value.round()):
                    assert torch.equal(parts[name], value), name
                torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=1e-12)


def check_nothing_comes_of_nothing(balancer: Balancer) -> None:
    """An empty batch, or all padding, is quoted the standing prices, and a step of those leaves them to the bit."""
    empty_TE, padding_T = batch()[:0], torch.zeros(T, dtype=torch.bool)
    for settled in (NO_STEPS, NO_STEPS + 7):
        choices: list[Choice] = []
        for score_TE, valid_T in ((empty_TE, None), (empty_TE, padding_T[:0]), (batch(), padding_T)):
            quoted_E = balancer.quote(score_TE, CALMLY, K, valid_T=valid_T, settled=settled)
            assert torch.equal(quoted_E, CALMLY.to(quoted_E.dtype))
            choices.append(choose(score_TE, quoted_E, K, valid_T))
        for seen in ([], choices):
            after_E = balancer.settle(CALMLY, observed(balancer, seen, CALMLY), K, settled=settled)
            assert torch.equal(after_E, CALMLY)


def check_few_tokens(balancer: Balancer) -> None:
    """Fewer tokens than experts, and every load a fraction: prices are finite."""
    for num_tokens, top_k in ((1, 1), (3, 1), (E - 1, K), (E + 1, E - 1)):
        score_TE = batch()[:num_tokens]
        assert quoted(balancer, score_TE, top_k, CALMLY).isfinite().all()
        assert step(balancer, [score_TE], CALMLY, top_k)[0].isfinite().all()


def check_every_expert_for_every_token(balancer: Balancer) -> None:
    """top_k = E is balanced at any prices: they are quoted as they stand, and settle at most shifted by one amount."""
    assert torch.equal(quoted(balancer, batch(), E, CALMLY), CALMLY)
    moved_E = step(balancer, [batch()], CALMLY, E)[0] - CALMLY
    torch.testing.assert_close(moved_E, moved_E[:1].expand(E), rtol=0, atol=1e-6)


def check_constant_scores(balancer: Balancer) -> None:
    """Nothing to tell the experts apart by: no NaN."""
    for constant in (0.0, 0.25, -3.0):
        score_TE = torch.full((T, E), constant, dtype=torch.float64)
        price_E = torch.zeros(E)
        for settled in range(3):
            assert quoted(balancer, score_TE, K, price_E).isfinite().all()
            price_E, _ = step(balancer, [score_TE], price_E, K, settled)
            assert price_E.isfinite().all()


def check_the_host_is_never_asked(balancer: Balancer) -> None:
    """Tensors without values do: no decision waits for one, and no shape depends on one."""
    names = [field.name for field in fields(Choice)]
    for masked in (False, True):
        real = choose(batch(torch.float32), CALMLY, K, torch.ones(T, dtype=torch.bool) if masked else None)
        stats = observed(balancer, [real], CALMLY)
        with FakeTensorMode() as mode:

            def fake(value: object) -> object:
                return mode.from_tensor(value) if isinstance(value, Tensor) else value

            values = {name: fake(getattr(real, name)) for name in names}
            price_E, settled = mode.from_tensor(CALMLY), mode.from_tensor(NO_STEPS)
            choice = Choice(**values)
            balancer.quote(choice.score_TE, price_E, K, valid_T=choice.valid_T, settled=settled)
            balancer.observe(choice, price_E)
            balancer.settle(price_E, {name: mode.from_tensor(stat) for name, stat in stats.items()}, K, settled=settled)


def check_refuses_impossible_layers(balancer: Balancer) -> None:
    balancer.check(E, K)
    balancer.check(E, E)
    for top_k in (0, -1, E + 1):
        with pytest.raises(ValueError, match=f"top_k={top_k} of {E} experts"):
            balancer.check(E, top_k)
