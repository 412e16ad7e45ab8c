"""Every balancer keeps the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from routing.balancer import Balancer, Unpriced
from routing.bip import Bip
from routing.cutoff import Cutoff
from routing.loss_free import LossFree
from routing.quantile import EdgeQuantile, Quantile
from routing.sinkhorn import Sinkhorn
from tests.routing import balancer_contract as contract

pytestmark = pytest.mark.fast

BALANCERS: list[Balancer] = [
    Unpriced(),
    LossFree(),
    LossFree(step=0.1, rule="proportional", decay=0.5, floor=0.01, centred=True),
    Bip(),
    Bip(rounds=2, gauge="none"),
    Bip(rounds=0),
    Quantile(),
    Quantile(rounds=0, bins=2, reach=0.1),
    Quantile(rounds=2, polish=3),
    EdgeQuantile(rounds=3),
    Sinkhorn(),
    Cutoff(),
]
CHECKS = [check for name, check in vars(contract).items() if name.startswith("check_")]


@pytest.mark.parametrize("balancer", BALANCERS, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_balancer_keeps_the_contract(balancer: Balancer, check: Callable[[Balancer], None]) -> None:
    if isinstance(balancer, Unpriced) and check is contract.check_refuses_impossible_layers:
        pytest.skip("whoever does not price serves any layer")
    check(balancer)


@pytest.mark.parametrize(
    "balancer, wrong",
    [
        (LossFree(), {"step": -1e-3}),
        (LossFree(), {"step": 0.0}),
        (LossFree(), {"step": float("nan")}),
        (LossFree(), {"decay": -0.5}),
        (LossFree(), {"floor": -0.1}),
        (LossFree(), {"floor": 0.1}),
        (LossFree(), {"rule": "signs"}),
        (Bip(), {"rounds": -1}),
        (Bip(), {"gauge": "mean"}),
        (Quantile(), {"rounds": -1}),
        (Quantile(), {"bins": 1}),
        (Quantile(), {"reach": 0.0}),
        (Quantile(), {"reach": float("inf")}),
        (Quantile(), {"polish": -2}),
        (EdgeQuantile(), {"rounds": -1}),
        (Sinkhorn(), {"temperature": 0.0}),
        (Sinkhorn(), {"rounds": -1}),
        (Cutoff(), {"decay": 1.0}),
        (Cutoff(), {"decay": -0.1}),
        (Cutoff(), {"bins": 0}),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_name_when_it_is_made(balancer: Any, wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=name) as error:
        replace(balancer, **wrong)
    assert str(value) in str(error.value)
