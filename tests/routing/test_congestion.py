"""gamma: what was put into an equilibrium comes out of its loads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.congestion import (
    Congestion,
    congestion,
    equilibrium,
    equilibrium_of_types,
    explicit_gamma,
    gamma_of,
    gamma_of_types,
    token_types,
    types_table,
)
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast
seeds = st.integers(0, 2**16)


@LAW
@given(seeds, st.integers(1, 24), st.integers(1, 4), st.floats(0.01, 20), st.floats(0, 1000))
def test_each_type_answers_the_load_that_all_of_them_make(
    seed: int, experts: int, types: int, spread: float, gamma: float
) -> None:
    rng = np.random.default_rng(seed)
    utility_GE = spread * rng.standard_normal((types, experts))
    weight_G = rng.dirichlet(np.ones(types))
    share_GE = equilibrium_of_types(utility_GE, weight_G, gamma)
    worth_GE = utility_GE - gamma * (weight_G @ share_GE)
    answer_GE = np.exp(worth_GE - worth_GE.max(axis=1, keepdims=True))
    np.testing.assert_allclose(share_GE, answer_GE / answer_GE.sum(axis=1, keepdims=True), atol=1e-9)


@LAW
@given(seeds, st.integers(2, 24), st.integers(1, 4), st.floats(0, 100))
def test_without_noise_gamma_is_exact(seed: int, experts: int, types: int, gamma: float) -> None:
    rng = np.random.default_rng(seed)
    utility_GE, weight_G = rng.standard_normal((types, experts)), rng.dirichlet(np.ones(types))
    share_GE = equilibrium_of_types(utility_GE, weight_G, gamma)
    assert gamma_of_types(utility_GE, share_GE, weight_G) == pytest.approx(gamma, rel=1e-6, abs=1e-6)


def test_400k_assignments_give_gamma_14_as_13_98_within_0_17() -> None:
    rng = np.random.default_rng(0)
    for gamma in (0.64, 9.0, 14.0, 27.0, 36.0):
        utility_E = rng.standard_normal(64)
        share_E = equilibrium(utility_E, gamma)
        noisy = [gamma_of(utility_E, rng.multinomial(400_000, share_E)) for _ in range(50)]
        if gamma == 14:
            assert (round(np.mean(noisy), 2), round(np.std(noisy), 2)) == (13.98, 0.17)
    assert (round(np.mean(noisy), 2), round(np.std(noisy), 2)) == (35.93, 0.26)


def test_a_small_gamma_is_a_temperature() -> None:
    """To first order the shares are softmax(u / (1 + gamma / E))."""
    utility_E = 0.01 * np.random.default_rng(3).standard_normal(16)
    warm_E = np.exp(utility_E / (1 + 8.0 / 16))
    np.testing.assert_allclose(equilibrium(utility_E, 8.0), warm_E / warm_E.sum(), rtol=1e-4)


def test_gamma_zero_is_the_softmax_and_a_large_gamma_is_even() -> None:
    utility_E = np.random.default_rng(4).standard_normal(8)
    np.testing.assert_allclose(equilibrium(utility_E, 0.0), np.exp(utility_E) / np.exp(utility_E).sum())
    np.testing.assert_allclose(equilibrium(utility_E, 1e6), np.full(8, 1 / 8), atol=1e-5)


def test_neither_the_level_of_logits_nor_the_number_of_rows_matters() -> None:
    rng = np.random.default_rng(5)
    utility_E, load_E = rng.standard_normal(12), rng.integers(1, 90, 12)
    assert gamma_of(utility_E + 7, load_E * 3) == pytest.approx(gamma_of(utility_E, load_E))


def measured(gamma: float, seed: int, coefficient: float = 0.0) -> Congestion:
    rng = np.random.default_rng(seed)
    utility_E = np.random.default_rng(0).standard_normal(64)
    load_BE = rng.multinomial(8000, equilibrium(utility_E, gamma), size=50)
    return congestion(np.tile(utility_E, (50, 1)), load_BE, coefficient=coefficient, resamples=400, seed=seed)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = [found.low <= 14 <= found.high for found in (measured(14.0, seed) for seed in range(40))]
    assert 34 <= sum(held) <= 40


def test_the_loss_explains_alpha_times_experts_of_gamma() -> None:
    found = measured(14.0, 1, coefficient=0.01)
    assert found.explicit == explicit_gamma(0.01, 64) == pytest.approx(0.64)
    assert found.implicit == found.gamma - found.explicit
    assert found.low < found.gamma < found.high
    assert found == measured(14.0, 1, coefficient=0.01), "the same seed gives the same interval"


def test_a_batch_counts_by_its_rows() -> None:
    rng = np.random.default_rng(6)
    utility_BE, load_BE = rng.standard_normal((2, 8)), rng.integers(1, 50, (2, 8))
    load_BE[1] *= 1000
    pooled_E = load_BE.sum(axis=0)
    mean_E = np.average(utility_BE, axis=0, weights=load_BE.sum(axis=1))
    assert congestion(utility_BE, load_BE).gamma == pytest.approx(gamma_of(mean_E, pooled_E))


def test_types_of_token_keep_gamma_where_one_type_would_lose_it() -> None:
    """Two kinds of token with opposite tastes make an even load; pooled, that looks like the work of a large gamma."""
    rng = np.random.default_rng(7)
    taste_E = 2 * rng.standard_normal(16)
    utility_GE = np.stack([taste_E, -taste_E + 0.5 * rng.standard_normal(16)])
    share_GE = equilibrium_of_types(utility_GE, np.array([0.6, 0.4]), 5.0)
    kind_T = (rng.random(40_000) < 0.4).astype(np.int64)
    logit_TE = utility_GE[kind_T] + 0.02 * rng.standard_normal((40_000, 16))
    edge_GE = share_GE.cumsum(axis=1)
    expert_TK = (rng.random(40_000)[:, None] > edge_GE[kind_T]).sum(axis=1)[:, None].clip(max=15)
    type_T = token_types(logit_TE, 2)
    assert np.array_equal(type_T, kind_T) or np.array_equal(type_T, 1 - kind_T)
    assert gamma_of_types(*types_table(logit_TE, expert_TK, type_T)) == pytest.approx(5, abs=0.5)
    one_GE, one_share_GE, one_G = types_table(logit_TE, expert_TK, np.zeros(40_000, dtype=np.int64))
    assert abs(gamma_of_types(one_GE, one_share_GE, one_G) - 5) > 5


def test_k_means_is_repeatable_and_survives_equal_tokens() -> None:
    logit_TE = np.random.default_rng(8).standard_normal((200, 4))
    assert np.array_equal(token_types(logit_TE, 5, seed=3), token_types(logit_TE, 5, seed=3))
    assert set(token_types(np.ones((10, 3)), 3).tolist()) == {0}
    assert token_types(logit_TE, 1).tolist() == [0] * 200


def test_choices_not_made_are_not_counted() -> None:
    table = types_table(np.zeros((3, 4)), [[0, -1], [0, 1], [-1, -1]], [0, 0, 0])
    np.testing.assert_allclose(table[1], np.array([[2, 1, 1, 1]]) / 5, err_msg="an expert without a row is given one")


def test_what_cannot_be_is_refused() -> None:
    even, two = np.full(4, 0.25), np.ones((2, 4))
    cases = {
        "exactly even": lambda: gamma_of(np.arange(4), even),
        "share is 0": lambda: gamma_of(np.arange(4), [0.5, 0.5, 0.0, 0.0]),
        "not finite": lambda: gamma_of([0, 1, math.nan, 2], even),
        "table of numbers": lambda: gamma_of([[1, 2], [3]], even),
        "needs 1 axes": lambda: gamma_of(two, even),
        "must agree": lambda: gamma_of(np.arange(3), even),
        "not unique": lambda: equilibrium(np.arange(4), -1.0),
        "weights must be": lambda: equilibrium_of_types(two, [-1, 2], 1.0),
        "at least 2 batches": lambda: congestion(two[:1], two[:1]),
        "one shape": lambda: congestion(two, np.ones((3, 4))),
        "none may be negative": lambda: congestion(two, -two),
        "resamples": lambda: congestion(two, two, resamples=0),
        "coefficient >= 0": lambda: explicit_gamma(-0.1, 4),
        "sorted into 3 types": lambda: token_types(two, 3),
        "got .*3, 1": lambda: types_table(two, np.zeros((3, 1), dtype=int), [0, 0]),
        "-1 to 3": lambda: types_table(two, [[4], [0]], [0, 0]),
        "whole numbers from 0": lambda: types_table(two, [[1], [0]], [-1, 1]),
        "no token is of type 0": lambda: types_table(two, [[1], [0]], [1, 1]),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
