"""Router: prices and logits stay fp32 whatever is done to the module around them, and prices survive a checkpoint."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from routing import Router, Sigmoid, Weigh

pytestmark = pytest.mark.fast

# A third, the step below one, the smallest normal number: bits that no narrower type and no round trip keeps.
PRICES = torch.tensor([1 / 3, 1 - 2**-24, 2.0**-126, -1e-3, 0.0, 257.0])
D, E = 5, len(PRICES)
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "float": lambda module: module.float(),
    "to bf16": lambda module: module.to(torch.bfloat16),
    "to cpu, fp64": lambda module: module.to("cpu", torch.float64),
    "type": lambda module: module.type(torch.float16),
    "there and back": lambda module: module.bfloat16().float(),
    "twice": lambda module: module.half().bfloat16(),
}


def priced(dtype: torch.dtype = torch.float32) -> Router:
    torch.manual_seed(0)
    router = Router(D, E, 2, score=Sigmoid(), weigh=Weigh(normalize=True), dtype=dtype)
    router.price_E.copy_(PRICES)
    return router


def bits(price_E: Tensor) -> list[int]:
    assert price_E.dtype == torch.float32
    return price_E.view(torch.int32).tolist()


@pytest.mark.parametrize("name", CASTS)
def test_prices_stay_fp32_to_the_bit_whatever_the_module_is_cast_to(name: str) -> None:
    router = priced()
    weight = CASTS[name](copy.deepcopy(router)).weight
    model = nn.Sequential(nn.Linear(D, D), router)
    assert CASTS[name](model) is model
    assert bits(router.price_E) == bits(PRICES)
    assert router.weight.dtype == weight.dtype
    assert model[0].weight.dtype == weight.dtype, "the rest of the module is cast"
    assert router.price_E is dict(router.named_buffers())["price_E"]


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_router_still_moves_its_prices_by_small_steps(name: str) -> None:
    """In bf16 a price of 257 would not move by a thousandth."""
    router = CASTS[name](priced())
    assert isinstance(router.price_E, Tensor)
    router.price_E.add_(1e-3)
    assert (router.price_E > PRICES).all()


@pytest.mark.parametrize("name", CASTS)
def test_prices_survive_a_checkpoint_to_the_bit(name: str) -> None:
    saved, file = CASTS[name](nn.Sequential(priced())), io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = nn.Sequential(Router(D, E, 2))
    CASTS[name](fresh).load_state_dict(state)
    assert bits(fresh.get_buffer("0.price_E")) == bits(PRICES)
    assert torch.equal(fresh.get_parameter("0.weight"), saved.get_parameter("0.weight"))


def test_prices_are_state_but_nothing_an_optimizer_sees() -> None:
    router = priced()
    stats = {"stat_load_E", "stat_kept_E", "stat_score_E", "stat_tokens"}
    assert set(router.state_dict()) == {"weight", "price_E", "settled"} | stats
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert not router.price_E.requires_grad


def test_a_fresh_router_charges_nothing() -> None:
    router = priced()
    router.reset_parameters()
    assert not router.price_E.any()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_logits_are_the_fp32_product_of_whatever_types_under_autocast_too(
    given: torch.dtype, weights: torch.dtype, autocast: torch.dtype | None
) -> None:
    router, x_TD = priced().to(weights), torch.randn(7, D, generator=torch.Generator().manual_seed(1)).to(given)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        choice = router(x_TD)
    assert choice.logit_TE.dtype == choice.score_TE.dtype == choice.weight_N.dtype == torch.float32
    assert torch.equal(choice.logit_TE, x_TD.float() @ router.weight.float().T)


def test_logits_of_fp64_tokens_are_fp64() -> None:
    choice = priced(torch.float64)(torch.randn(7, D, dtype=torch.float64))
    assert choice.logit_TE.dtype == choice.score_TE.dtype == choice.weight_N.dtype == torch.float64


def test_gradients_come_back_in_the_types_of_their_owners() -> None:
    router = priced().bfloat16()
    x_TD = torch.randn(7, D, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router(x_TD).weight_N.square().sum().backward()
    assert x_TD.grad is not None
    assert router.weight.grad is not None
    assert x_TD.grad.dtype == router.weight.grad.dtype == torch.bfloat16
    assert router.weight.grad.any()


def test_a_router_made_on_no_device_gets_its_prices_with_its_weights() -> None:
    router = Router(D, E, 2, device="meta", dtype=torch.bfloat16)
    router.to_empty(device="cpu")
    router.reset_parameters()
    assert router.price_E.dtype == torch.float32
    assert router.price_E.device.type == "cpu"
    assert not router.price_E.any()
