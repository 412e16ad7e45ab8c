"""Our parts inside Megatron-Core are Megatron-Core: outputs, gradients, their scale, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moe import World
from placement import Placement
from routing import Balancer, Bip, LeastLoaded, LossFree, Quantile
from tests.moe.integrations.conftest import warmed

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None, reason="megatron-core is not installed; pip install 'evenmoe[dev]'"
)
COPIES = Placement(expert_RS=[[0, 1, 2, 3, 7], [4, 5, 6, 7, 0]])
NO_PRICES = {"assigner": LeastLoaded(headroom=1.05)}


def prepare() -> None:
    import tests.moe.integrations.megatron_ranks  # noqa: F401


@pytest.fixture(scope="module")
def ranks(world: Callable[[int], World]) -> Callable[[int], World]:
    return warmed(world, prepare)


def call(name: str, *args: object) -> object:
    """Of a rank: what is named there. Megatron is imported on the ranks alone."""
    from tests.moe.integrations import megatron_ranks

    return getattr(megatron_ranks, name)(*args)


def test_a_layer_of_ours_is_megatrons_own(ranks: Callable[[int], World]) -> None:
    """Whichever part is ours, whoever visits: outputs, gradients of the input, of experts, router and shared expert."""
    for errors, visits in ranks(2).run(call, "beside_megatrons_own", torch.float64):
        assert max(errors.values()) < 1e-12, errors
        assert len(visits) >= 4, visits


def test_bf16_is_as_far_off_as_megatrons_own(ranks: Callable[[int], World]) -> None:
    for errors, _ in ranks(2).run(call, "beside_megatrons_own", torch.bfloat16):
        assert max(errors.values()) < 0.04, errors


def test_experts_live_anywhere_and_groups_are_those_given(ranks: Callable[[int], World]) -> None:
    """Uneven, with copies, on one rank of two: against a layer whose collection holds groups of one rank."""
    for errors in ranks(2).run(call, "placed_anyhow"):
        assert max(errors.values()) < 1e-12, errors


def test_megatrons_recomputation_repeats_the_choice_and_counts_it_once(ranks: Callable[[int], World]) -> None:
    for error in ranks(2).run(call, "recomputed"):
        assert error < 1e-12


def test_padding_is_not_counted_and_changes_nothing_else(ranks: Callable[[int], World]) -> None:
    for errors in ranks(2).run(call, "padded"):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("balancer", [LossFree(step=0.1), Bip(rounds=4), Quantile(rounds=0)], ids=str)
def test_prices_are_those_of_one_process_whichever_layer_asks(
    ranks: Callable[[int], World], balancer: Balancer
) -> None:
    """Ours, Megatron's own with our router, and Megatron's own with our dispatcher too; settled over its group."""
    for difference, prices, imbalance in ranks(2).run(call, "priced", balancer):
        assert difference < 1e-12
        for price_E in prices[1:]:
            assert torch.allclose(price_E, prices[0], rtol=1e-5, atol=1e-6)
        assert imbalance[-1] < 0.8 * imbalance[0] or imbalance[0] < 0.3


def test_the_tools_of_evenmoe_know_the_layer(ranks: Callable[[int], World]) -> None:
    found = ranks(2).run(call, "known_to_tools")
    assert [sorted(each["ids"]) for each in found] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for each in found:
        assert each["load"] == 9 * 2 * 2  # tokens of a rank, twice two of them
        assert each["moves"] == 4
        assert each["marks"]
        assert each["y"] < 1e-12


def test_gradients_under_megatrons_ddp_are_of_the_same_scale(ranks: Callable[[int], World]) -> None:
    """A GPTModel on two expert-parallel groups of two, in two micro-batches, finalised; averaged in either way."""
    for errors in ranks(4).run(call, "in_a_model"):
        assert max(errors.values()) < 1e-11, errors


@pytest.mark.parametrize("singleton", [False, True], ids=["one tensor for all experts", "one key an expert"])
def test_distributed_checkpoints_go_by_expert(ranks: Callable[[int], World], tmp_path: Path, singleton: bool) -> None:
    """From ours to ours over other ranks, from Megatron's own to ours and back; copies and prices included."""
    world, ours, spread = ranks(2), {"balancer": LossFree()}, {"balancer": LossFree(), "placement": COPIES}
    world.run(call, "saved", str(tmp_path / "ours"), 2, spread, singleton, True)
    want, prices = _together(world.run(call, "loaded", str(tmp_path / "ours"), 2, ours, singleton))
    assert len(want) == 2 * (8 * 2 + 1)
    for number, price_E in enumerate(prices):
        assert torch.equal(price_E, torch.arange(8) + 10.0 * number)
    for experts_over, kind in ((1, ours), (2, spread), (1, {}), (2, NO_PRICES)):
        got, _ = _together(world.run(call, "loaded", str(tmp_path / "ours"), experts_over, kind, singleton))
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], want[name]) for name in want), (experts_over, kind)

    world.run(call, "saved", str(tmp_path / "theirs"), 2, {}, singleton)
    want, _ = _together(world.run(call, "loaded", str(tmp_path / "theirs"), 1, {}, singleton))
    got, _ = _together(world.run(call, "loaded", str(tmp_path / "theirs"), 2, NO_PRICES, singleton))
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def _together(
    ranks: list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]],
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The experts of all ranks; where two have the same one, they agree."""
    all_of: dict[str, torch.Tensor] = {}
    for found, _ in ranks:
        for name, weight in found.items():
            assert torch.equal(all_of.setdefault(name, weight), weight), name
    return all_of, ranks[0][1]
