"""The drop-in, against what DeepSeek publishes and against the plan's own rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.eplb import rebalance_experts
from tests.placement.test_packed import README

pytestmark = pytest.mark.fast


def test_the_published_example_gives_the_published_tensor() -> None:
    phy2log, log2phy, logcnt = rebalance_experts(torch.tensor(README), 16, 4, 2, 8)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert logcnt.dtype == torch.int64
    assert logcnt.sum(dim=1).tolist() == [16, 16]
    assert log2phy.shape == (2, 12, 2)


@given(st.integers(0, 999), st.sampled_from([(1, 1), (4, 2), (2, 4), (3, 2)]), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_the_three_tables_tell_one_story(seed: int, groups_nodes: tuple[int, int], spare: int) -> None:
    groups, nodes = groups_nodes
    weight = np.random.default_rng(seed).integers(0, 50, (3, 12))
    phy2log, log2phy, logcnt = rebalance_experts(weight, (2 + spare) * 8, groups, nodes, 8)
    for layer in range(3):
        assert (np.bincount(phy2log[layer], minlength=12) == logcnt[layer]).all()
        for expert in range(12):
            slots = log2phy[layer, expert, : logcnt[layer, expert]]
            assert (phy2log[layer, slots] == expert).all()
            assert len(set(slots.tolist())) == logcnt[layer, expert]
            assert (log2phy[layer, expert, logcnt[layer, expert] :] == -1).all()
    if groups % nodes == 0:
        node_of = np.arange(phy2log.shape[1]) * nodes // phy2log.shape[1]
        for layer, group in np.ndindex(3, groups):
            members = phy2log[layer] // (12 // groups) == group
            assert len(set(node_of[members].tolist())) == 1


def test_numbers_that_do_not_divide_name_both() -> None:
    with pytest.raises(ValueError, match=r"num_replicas \(13\) must be a multiple of num_gpus \(8\)"):
        rebalance_experts(README, 13, 1, 1, 8)
