"""Histogram: counts that add up to the bit, and quantiles to within a bin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routing.histogram import Histogram
from tests.routing.batches import LAW

pytestmark = pytest.mark.fast

SEEDS = st.integers(0, 2**16)


def values(seed: int, num_tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Values of 5 experts, some far off, and a centre for each."""
    rng = np.random.default_rng(seed)
    value_TE = rng.standard_normal((num_tokens, 5)) * np.array([1e-4, 0.01, 0.3, 1.0, 3.0])
    return torch.from_numpy(value_TE).to(dtype), torch.from_numpy(0.1 * rng.standard_normal(5)).to(torch.float32)


@settings(LAW, max_examples=40)
@given(SEEDS, st.integers(0, 300), st.integers(2, 100), st.sampled_from([torch.float32, torch.float64]))
def test_every_value_counts_once_however_they_are_spread(
    seed: int, num_tokens: int, bins: int, dtype: torch.dtype
) -> None:
    value_TE, centre_E = values(seed, num_tokens, dtype)
    histogram = Histogram(bins=bins, reach=2.0)
    whole_EB = histogram.count(value_TE, centre_E, None)
    assert whole_EB.shape == (5, bins)
    assert (whole_EB.sum(dim=1) == num_tokens).all()
    part_T = torch.from_numpy(np.random.default_rng(seed).integers(0, 7, num_tokens))
    parts = [histogram.count(value_TE[part_T == part], centre_E, None) for part in range(7)]
    assert torch.equal(sum(parts, torch.zeros_like(whole_EB)), whole_EB)
    masked = [histogram.count(value_TE, centre_E, part_T == part) for part in range(7)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(masked, parts))


@settings(LAW, max_examples=40)
@given(SEEDS, st.integers(1, 300), st.integers(2, 100))
def test_a_value_is_in_the_bin_between_whose_edges_it_lies(seed: int, num_tokens: int, bins: int) -> None:
    value_TE, centre_E = values(seed, num_tokens)
    histogram = Histogram(bins=bins, reach=2.0)
    edge_B = histogram.edges(torch.device("cpu"))
    assert edge_B[0].item() == pytest.approx(-2.0)
    assert edge_B[-1].item() == pytest.approx(2.0)
    for expert, centre in enumerate(centre_E.double().tolist()):
        inner_B = edge_B[1:-1].contiguous()
        bin_T = torch.bucketize(value_TE[:, expert] - centre, inner_B, right=True)
        expected_B = torch.bincount(bin_T, minlength=bins).double()
        assert torch.equal(histogram.count(value_TE, centre_E, None)[expert], expected_B)


@settings(LAW, max_examples=60)
@given(SEEDS, st.integers(2, 400), st.integers(20, 300), st.floats(0.02, 0.98))
def test_both_ends_are_within_a_bin_of_the_neighbours_in_order(
    seed: int, num_tokens: int, bins: int, share: float
) -> None:
    value_TE, centre_E = values(seed, num_tokens)
    histogram = Histogram(bins=bins, reach=20.0)
    rank = max(1, min(num_tokens - 1, round(share * num_tokens)))
    ends = histogram.ends(histogram.count(value_TE, centre_E, None), torch.tensor(float(rank)))
    offset_TE = (value_TE - centre_E).sort(dim=0, descending=True).values
    edge_B = histogram.edges(torch.device("cpu"))
    for end_E, exact_E in ((ends.lower, offset_TE[rank]), (ends.upper, offset_TE[rank - 1])):
        bin_E = torch.bucketize(exact_E.contiguous(), edge_B, right=True).clamp(1, bins)
        assert (end_E >= edge_B[bin_E - 1] - 1e-12).all()
        assert (end_E <= edge_B[bin_E] + 1e-12).all()
    assert (ends.lower <= ends.upper + 1e-15).all()


def test_bins_are_finest_at_the_centre_and_a_share_of_the_distance_away_from_it() -> None:
    edge_B = Histogram(bins=256, reach=2.0).edges(torch.device("cpu"))
    width_B = edge_B.diff()
    assert width_B.min() == pytest.approx(width_B[127].item())
    assert width_B.min() < 1e-6
    far_B = edge_B[1:] > 1e-4
    assert (width_B[far_B] / edge_B[1:][far_B] < 0.12).all()
