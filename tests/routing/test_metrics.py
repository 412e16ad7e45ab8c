"""The meters of load, against definitions in plain Python and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from placement import Placement
from placement.metrics import peak_over_mean
from routing.metrics import (
    Balance,
    cv,
    dead,
    drop_share,
    entropy,
    flat,
    gini,
    max_vio,
    mean_score,
    over_layers,
    price_spread,
    rank_peak,
    rank_share,
    readings,
    saturated,
    sum_f2,
    sum_fp,
)
from routing.tally import Tally
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
EVENNESS = (max_vio, cv, entropy, gini, sum_f2)
loads = st.lists(st.integers(0, 2**20), min_size=1, max_size=12)


def by_hand(load: list[int]) -> dict[Callable[[Tensor], Tensor], float]:
    """The definitions, in floating point of the host."""
    size, total = len(load), sum(load)
    if total == 0:
        return {max_vio: 0, cv: 0, entropy: 1, gini: 0, sum_f2: 1}
    mean, share = total / size, [rows / total for rows in load]
    apart = sum(abs(a - b) for a in load for b in load)
    bits = -sum(f * math.log(f) for f in share if f > 0)
    return {
        max_vio: max(load) / mean - 1,
        cv: math.sqrt(sum((rows - mean) ** 2 for rows in load) / size) / mean,
        entropy: bits / math.log(size) if size > 1 else 1,
        gini: apart / (2 * size * total),
        sum_f2: size * sum(f * f for f in share),
    }


@LAW
@given(loads)
def test_every_meter_is_its_definition(load: list[int]) -> None:
    load_E = torch.tensor(load)
    for meter, expected in by_hand(load).items():
        assert float(meter(load_E)) == pytest.approx(expected, rel=2e-5, abs=2e-5), meter.__name__
    assert int(dead(load_E)) == load.count(0)


def test_the_numbers_of_the_worked_example() -> None:
    load_E = torch.tensor([4, 3, 1, 0])
    assert float(max_vio(load_E)) == 1
    assert float(cv(load_E)) == pytest.approx(0.7906, abs=5e-5)
    assert float(entropy(load_E)) == pytest.approx(0.7028, abs=5e-5)
    assert float(gini(load_E)) == pytest.approx(0.4375)
    assert int(dead(load_E)) == 1


@LAW
@given(loads, st.integers(0, 2**16), st.integers(2, 64))
def test_meters_know_neither_the_order_of_experts_nor_the_number_of_rows(
    load: list[int], seed: int, times: int
) -> None:
    load_E = torch.tensor(load)
    shuffled_E = load_E[torch.from_numpy(np.random.default_rng(seed).permutation(len(load)))]
    for meter in EVENNESS:
        torch.testing.assert_close(meter(times * shuffled_E), meter(load_E), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("load", [[0, 0, 0], [5], [0], [7, 7, 7, 7, 7, 7]])
def test_no_rows_one_expert_and_even_loads_read_as_exactly_even(load: list[int]) -> None:
    assert [float(meter(torch.tensor(load))) for meter in EVENNESS] == [0, 0, 1, 0, 1]


def test_leading_axes_are_kept_and_each_layer_reads_as_it_would_alone() -> None:
    load_SLE = torch.from_numpy(np.random.default_rng(0).integers(0, 99, (3, 4, 5)))
    for meter in (*EVENNESS, dead):
        together_SL = meter(load_SLE)
        assert together_SL.shape == (3, 4)
        alone = torch.stack([meter(load_E) for load_E in load_SLE.reshape(-1, 5)])
        torch.testing.assert_close(together_SL.reshape(-1), alone)


def test_half_precision_loads_are_measured_in_fp32() -> None:
    load_E = torch.tensor([40_000.0, 60_000.0], dtype=torch.float16)  # their sum overflows fp16
    assert float(max_vio(load_E)) == pytest.approx(0.2, abs=1e-3)


def test_four_layers_that_collapsed_on_different_experts_do_not_cancel() -> None:
    """k times sum_fp is the loss of those who leave out 1/k: 7.99 for each layer, and pooled it reads like even, 2."""
    torch.manual_seed(0)
    top_k, scores, load_of = 2, [], []
    for layer in range(4):
        logit_TE = torch.randn(1024, 8) * 0.1
        logit_TE[:, 2 * layer : 2 * layer + 2] += 8
        scores.append(logit_TE.softmax(dim=-1))
        load_of.append(torch.bincount(scores[-1].topk(top_k).indices.flatten(), minlength=8))
    load_LE, score_LTE = torch.stack(load_of), torch.stack(scores)
    mean_LE = mean_score(score_LTE, None)
    assert top_k * float(sum_fp(load_LE, mean_LE).mean()) == pytest.approx(7.99, abs=0.005)
    assert top_k * float(sum_fp(load_LE.sum(0), mean_LE.mean(0))) == pytest.approx(2, abs=0.001)
    balance_of = {str(layer): Balance.of(load_E, torch.zeros(8)) for layer, load_E in enumerate(load_LE)}
    assert over_layers(readings(balance_of))["mean"]["max_vio"] == pytest.approx(3)
    assert over_layers(readings(balance_of))["mean"]["sum_f2"] == pytest.approx(4)


def flattened(scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logit_TE = torch.randn(8192, 96, generator=generator) + torch.randn(96, generator=generator)
    score_TE = (scale * logit_TE).softmax(dim=-1)
    return torch.bincount(score_TE.argmax(dim=-1), minlength=96), mean_score(score_TE, None)


def test_the_alarm_sees_flat_scores_that_the_loss_does_not() -> None:
    load_E, mean_score_E = flattened(0.01)
    assert float(sum_fp(load_E, mean_score_E)) == pytest.approx(1.019, abs=5e-4)
    assert float(sum_f2(load_E)) == pytest.approx(8.176, abs=5e-3)
    assert float(max_vio(load_E)) == pytest.approx(12.58, abs=5e-3)
    assert bool(flat(load_E, mean_score_E))
    sharp_E, sharp_score_E = flattened(1.0)
    assert float(sum_fp(sharp_E, sharp_score_E)) == pytest.approx(4.07, abs=5e-3)
    assert not bool(flat(sharp_E, sharp_score_E))
    assert not bool(flat(torch.full((96,), 85), torch.full((96,), 1 / 96))), "even loads raise no alarm"


@pytest.mark.parametrize("bad", [torch.tensor(3), torch.zeros(2, 0)])
def test_a_load_without_experts_is_refused(bad: Tensor) -> None:
    for meter in (*EVENNESS, price_spread):
        with pytest.raises(ValueError, match="at least one expert"):
            meter(bad)
    with pytest.raises(ValueError, match="a single number"):
        dead(torch.tensor(3))
    with pytest.raises(ValueError, match=r"\[..., tokens, experts\]"):
        mean_score(torch.zeros(4), None)


def test_half_precision_scores_are_averaged_in_fp32() -> None:
    score_TE = torch.rand(3000, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(mean_score(score_TE, None), mean_score(score_TE.double(), None).float())


def test_a_load_that_is_not_a_number_does_not_read_as_even() -> None:
    load_E = torch.tensor([1.0, torch.nan, 2.0])
    assert all(bool(meter(load_E).isnan()) for meter in EVENNESS)


def test_padding_has_no_mean_score() -> None:
    score_TE = torch.tensor([[0.2, 0.6], [9.0, 1.0], [0.1, 0.1]])
    score_TE[1] = torch.nan
    mean_E = mean_score(score_TE, torch.tensor([True, False, True]))
    torch.testing.assert_close(mean_E, torch.tensor([0.375, 0.625]))
    with pytest.raises(ValueError, match=r"valid_T has shape \(2,\)"):
        mean_score(score_TE, torch.tensor([True, False]))


def test_drops_are_a_share_of_what_was_wanted() -> None:
    assert float(drop_share(torch.tensor([6, 4]), torch.tensor([3, 4]))) == pytest.approx(0.3)
    assert float(drop_share(torch.tensor([0, 0]), torch.tensor([0, 0]))) == 0
    with pytest.raises(ValueError, match="wanted_E has shape"):
        drop_share(torch.tensor([6, 4, 1]), torch.tensor([3, 4]))


def test_rank_peak_is_the_peak_of_ranks_that_placement_knows() -> None:
    rng = np.random.default_rng(1)
    placement = Placement(expert_RS=[[0, 1, 2], [3, 4, 0], [5, 0, 3]])
    for _ in range(20):
        load_E = rng.integers(0, 50, 6)
        expected = peak_over_mean(load_E @ (placement.held_RE / placement.copies_E).T, [1, 1, 1])
        measured = rank_peak(torch.from_numpy(load_E), rank_share(placement))
        assert float(measured) == pytest.approx(float(expected), rel=1e-5)
    assert float(rank_peak(torch.zeros(6), rank_share(placement))) == 1
    with pytest.raises(ValueError, match="share_RE must be"):
        rank_peak(torch.zeros(5), rank_share(placement))


def test_the_saturation_alarm_rings_when_prices_outrange_scores() -> None:
    price_E = torch.tensor([-0.4, 0.1, 0.6])
    assert float(price_spread(price_E)) == pytest.approx(1)
    assert bool(saturated(torch.tensor([-0.5, 0.1, 0.5]), 1.0))
    assert not bool(saturated(torch.tensor([-0.4, 0.1, 0.5]), 1.0))
    assert not bool(saturated(torch.tensor([-40.0, 50.0]), math.inf))


def test_a_reading_holds_what_was_measured_and_nothing_else() -> None:
    load_E, price_E = torch.tensor([4, 3, 1, 0]), torch.tensor([0.0, 0.5, 1.0, 2.0])
    bare = readings({"0": Balance.of(load_E, price_E)})["0"]
    assert set(bare) == {"max_vio", "cv", "entropy", "gini", "dead", "sum_f2", "price_spread", "saturated"}
    assert (bare["max_vio"], bare["dead"], bare["price_spread"], bare["saturated"]) == (1, 1, 2, 1)
    full = Balance.of(
        load_E,
        price_E,
        score_range=5.0,
        mean_score_E=torch.full((4,), 0.25),
        wanted_E=torch.tensor([8, 3, 1, 0]),
        share_RE=rank_share(Placement(expert_RS=[[0, 3], [1, 2]])),
        dual_gap=torch.tensor(1e-3),
        loss_share=torch.tensor(0.01),
    )
    both = readings({"a": Balance.of(load_E, price_E), "b": full})
    assert both["a"] == bare
    assert both["b"]["saturated"] == 0
    assert both["b"]["flat"] == 1
    assert both["b"]["drop_share"] == pytest.approx(1 / 3)
    assert both["b"]["rank_peak"] == 1
    assert both["b"]["dual_gap"] == pytest.approx(1e-3)
    assert readings({}) == {}


def test_a_reading_of_several_layers_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="one layer"):
        Balance.of(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"price_E has shape \(3,\)"):
        Balance.of(torch.zeros(4), torch.zeros(3))


def test_over_layers_summarises_finite_numbers_of_the_layers_that_have_them() -> None:
    over = over_layers({"0": {"a": 1.0, "b": 5.0}, "1": {"a": 3.0}, "2": {"a": math.nan}})
    assert over["mean"] == {"a": 2.0, "b": 5.0}
    assert over["p50"]["a"] == 2
    assert over["p95"]["a"] == pytest.approx(2.9)
    assert over["max"] == {"a": 3.0, "b": 5.0}


@LAW
@given(st.lists(st.lists(st.integers(0, 99), min_size=6, max_size=6), min_size=1, max_size=8))
def test_a_tally_is_the_mean_and_the_largest_of_its_steps(rows: list[list[int]]) -> None:
    load_SLE = torch.tensor(rows).reshape(-1, 2, 3)
    tally = Tally.empty(2, 3)
    for load_LE in load_SLE:
        tally = tally.add(load_LE)
    vio_SL = max_vio(load_SLE.double())
    torch.testing.assert_close(tally.avg_L, vio_SL.mean(0))
    torch.testing.assert_close(tally.sup_L, vio_SL.amax(0))
    torch.testing.assert_close(tally.avg, vio_SL.mean())
    torch.testing.assert_close(tally.sup, vio_SL.mean(1).amax())
    torch.testing.assert_close(tally.global_L, max_vio(load_SLE.sum(0).double()))
    assert tally.steps == len(load_SLE)


def test_specialised_experts_are_uneven_in_a_batch_and_even_over_the_run() -> None:
    tally = Tally.empty(1, 4)
    for step in range(8):
        load_LE = torch.zeros(1, 4)
        load_LE[0, step % 4] = 100
        tally = tally.add(load_LE)
    assert (float(tally.avg), float(tally.sup), float(tally.global_L)) == (3, 3, 0)


def test_a_tally_refuses_another_model_and_has_no_mean_before_its_first_step() -> None:
    with pytest.raises(ValueError, match=r"\[2 layers, 3 experts\]"):
        Tally.empty(2, 3).add(torch.zeros(3))
    with pytest.raises(ValueError, match="no step"):
        _ = Tally.empty(2, 3).avg
    with pytest.raises(ValueError, match="at least one"):
        Tally.empty(0, 3)


def test_meters_and_tally_make_no_data_dependent_shape_or_host_read() -> None:
    """On the meta device there are no values: whatever reads one there fails."""
    load_E, price_E = torch.zeros(8, device="meta"), torch.zeros(8, device="meta")
    share_RE = torch.zeros(2, 8, device="meta")
    balance = Balance.of(load_E, price_E, mean_score_E=load_E, wanted_E=load_E, share_RE=share_RE)
    assert all(value.shape == () for value in balance.measured().values())
    score_TE, valid_T = torch.zeros(5, 8, device="meta"), torch.zeros(5, dtype=torch.bool, device="meta")
    assert mean_score(score_TE, valid_T).shape == (8,)
    assert Tally.empty(1, 8, "meta").add(load_E[None]).avg.shape == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False")
@pytest.mark.filterwarnings("default")
def test_on_a_gpu_nothing_waits_for_the_device_but_readings() -> None:
    load_E, price_E = torch.arange(8, device="cuda"), torch.zeros(8, device="cuda")
    score_TE, valid_T = torch.rand(5, 8, device="cuda"), torch.ones(5, dtype=torch.bool, device="cuda")
    share_RE, tally = torch.full((2, 8), 0.5, device="cuda"), Tally.empty(1, 8, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mean_score_E = mean_score(score_TE, valid_T)
        balance = Balance.of(load_E, price_E, mean_score_E=mean_score_E, wanted_E=load_E, share_RE=share_RE)
        tally = tally.add(load_E[None])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert readings({"0": balance})["0"]["max_vio"] == float(tally.avg) == 1
