"""Jitter: in training only, on a copy, and the same again in a recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routing import Router

pytestmark = pytest.mark.fast


def router(jitter: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Router, Tensor]:
    torch.manual_seed(0)
    return Router(8, 6, 2, jitter=jitter, dtype=dtype), torch.randn(40, 8, dtype=dtype)


def test_it_acts_in_training_alone() -> None:
    layer, x_TD = router()
    plain_TE = x_TD @ layer.weight.T
    assert not torch.equal(layer(x_TD).logit_TE, layer(x_TD).logit_TE)
    torch.testing.assert_close(layer.eval()(x_TD).logit_TE, plain_TE)
    torch.testing.assert_close(router(0.0)[0].train()(x_TD).logit_TE, plain_TE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_input_stays_as_it_was(dtype: torch.dtype) -> None:
    layer, x_TD = router(dtype=dtype)
    given, version = x_TD.clone(), x_TD._version
    layer(x_TD)
    layer(x_TD, torch.arange(40) % 2 == 0)
    assert torch.equal(x_TD, given)
    assert x_TD._version == version


def test_every_entry_is_multiplied_by_a_number_within_the_jitter() -> None:
    layer, x_TD = router(0.1)
    seen: list[Tensor] = []
    real = layer.logits
    layer.logits = lambda x_TD: (seen.append(x_TD), real(x_TD))[1]  # type: ignore[method-assign, func-returns-value]
    layer(x_TD)
    factor_TD = seen[0] / x_TD
    assert factor_TD.min() >= 0.9 - 1e-12
    assert factor_TD.max() <= 1.1 + 1e-12
    assert factor_TD.std() > 0.05


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_recomputation_jitters_alike(reentrant: bool) -> None:
    layer, x_TD = router()
    grads = []
    for recompute in (False, True):
        layer.weight.grad = None
        x = x_TD.clone().requires_grad_()
        logits: list[Tensor] = []
        handle = layer.register_forward_hook(
            lambda module, inputs, choice, to=logits: to.append(choice.logit_TE.detach())
        )
        torch.manual_seed(5)

        def run(x: Tensor) -> Tensor:
            return layer(x).weight_N.square()  # type: ignore[no-any-return]

        square_N = checkpoint(run, x, use_reentrant=reentrant) if recompute else run(x)
        torch.manual_seed(99)  # what others drew meanwhile must not matter
        square_N.sum().backward()
        handle.remove()
        grads.append((x.grad, layer.weight.grad))
        assert all(torch.equal(logit_TE, logits[0]) for logit_TE in logits)
        assert len(logits) == 1 + recompute
    for plain, again in zip(*grads):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("jitter", [-0.1, 1.0, float("nan")])
def test_a_jitter_that_could_turn_an_input_around_is_refused(jitter: float) -> None:
    with pytest.raises(ValueError, match=f"jitter={jitter}"):
        router(jitter)
