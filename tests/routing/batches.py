"""Batches, drawn and made: what each rank routed to each expert, where the experts live. And how laws are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placement import Placement

# Laws must not depend on the machine: the same examples everywhere, and no clock decides.
LAW = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)


class Batch(NamedTuple):
    count_RE: NDArray[np.int64]
    placement: Placement

    @property
    def load_E(self) -> NDArray[np.int64]:
        load_E: NDArray[np.int64] = self.count_RE.sum(axis=0)
        return load_E

    @property
    def home_R(self) -> NDArray[np.int64]:
        """Rows that each rank would compute if every row stayed at its expert's home."""
        home_R = np.zeros(len(self.count_RE), dtype=np.int64)
        np.add.at(home_R, self.placement.home_E, self.load_E)
        return home_R


def placed(held_RE: NDArray[np.bool_]) -> Placement:
    """The placement in which each rank holds these experts."""
    slots = max(int(held_RE.sum(axis=1).max()), 1)
    expert_RS = np.full((len(held_RE), slots), -1, dtype=np.int64)
    for rank, held_E in enumerate(held_RE):
        experts = np.flatnonzero(held_E)
        expert_RS[rank, : len(experts)] = experts
    return Placement(expert_RS=expert_RS)


def at_homes(home_E: Sequence[int], ranks: int, copies: Sequence[tuple[int, int]] = ()) -> Placement:
    """Experts with these homes, and more copies at (rank, expert); a copy on an earlier rank becomes the home."""
    held_RE = np.zeros((ranks, len(home_E)), dtype=np.bool_)
    held_RE[list(home_E), range(len(home_E))] = True
    for rank, expert in copies:
        held_RE[rank, expert] = True
    return placed(held_RE)


def contiguous(num_experts: int, ranks: int) -> Placement:
    """Blocks of neighbours, as even as can be."""
    return at_homes([expert * ranks // num_experts for expert in range(num_experts)], ranks)


def scattered(load_E: Sequence[int], ranks: int, seed: int) -> NDArray[np.int64]:
    """Tables with these loads, each expert's rows coming from random ranks, often from few."""
    rng = np.random.default_rng(seed)
    share_ER = rng.dirichlet(np.full(ranks, rng.choice([0.1, 1.0, 100.0])), size=len(load_E))
    return np.ascontiguousarray(rng.multinomial(load_E, share_ER).T, dtype=np.int64)


def zipf(
    num_experts: int, ranks: int, exponent: float, seed: int, *, rows: int = 1000, ragged: bool = False
) -> NDArray[np.int64]:
    """A realistic router: Zipf popularity, experts in random order, each rank's tokens with a taste of their own."""
    rng = np.random.default_rng(seed)
    share_E = 1.0 / np.arange(1, num_experts + 1) ** exponent
    share_E = rng.permutation(share_E / share_E.sum())
    rows_R = [int(rows * rng.uniform(0.7, 1.0)) if ragged else rows for _ in range(ranks)]
    taste_RE = rng.dirichlet(share_E * 200.0 * num_experts, size=ranks)
    return np.stack([rng.multinomial(rows, taste_E) for rows, taste_E in zip(rows_R, taste_RE)]).astype(np.int64)


@st.composite
def placements(draw: st.DrawFn, max_ranks: int = 8, copies: bool = True) -> Placement:
    """Any placement: uneven ranks, ranks without experts, fewer experts than ranks, copies or not.

    Hypothesis draws, and shrinks, the sizes; a seed fills them in, because a thousand drawn lists take seconds.
    """
    ranks, experts, seed = draw(st.integers(1, max_ranks)), draw(st.integers(1, 12)), draw(st.integers(0, 2**16))
    more = draw(st.integers(1, 8)) if copies else 0
    rng = np.random.default_rng(seed)
    extra = np.stack([rng.integers(0, ranks, more), rng.integers(0, experts, more)], axis=1)
    return at_homes(rng.integers(0, ranks, experts).tolist(), ranks, extra.tolist())


@st.composite
def batches(draw: st.DrawFn, max_ranks: int = 8, copies: bool | None = None) -> Batch:
    """Any placement under any load: small or large loads, even or with few hot experts, with some zeros or many."""
    placement = draw(placements(max_ranks=max_ranks, copies=draw(st.booleans()) if copies is None else copies))
    most, seed = draw(st.sampled_from([3, 60, 5000])), draw(st.integers(0, 2**16))
    rng, experts = np.random.default_rng(seed), placement.num_experts
    load_E = (most + 1) * rng.random(experts) ** rng.choice([0.2, 1.0, 6.0]) * (rng.random(experts) < rng.random())
    return Batch(scattered(load_E.astype(np.int64).tolist(), placement.ranks, seed), placement)


@st.composite
def balanced_batches(draw: st.DrawFn, max_ranks: int = 8) -> Batch:
    """Every rank computes the same number of rows at home, however its experts share them."""
    ranks, experts = draw(st.integers(1, max_ranks)), draw(st.integers(1, 4))
    rows, seed = draw(st.integers(0, 500)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    load_RE = [rng.multinomial(rows, rng.dirichlet(np.full(experts, 0.5))) for _ in range(ranks)]
    placement = at_homes([rank for rank in range(ranks) for _ in range(experts)], ranks)
    return Batch(scattered(np.concatenate(load_RE).tolist(), ranks, seed), placement)


@st.composite
def crumbs(draw: st.DrawFn) -> tuple[Batch, int]:
    """One or two ranks have too many rows, and the others' room for them, at the mean, comes in pieces of hardly a
    chunk: the hard case of min_chunk. -> the batch, and the chunk"""
    chunk = draw(st.integers(2, 20))
    largest = draw(st.sampled_from([chunk, chunk // 2, -(-chunk // 5)]))
    room_R = draw(st.lists(st.integers(0, largest), min_size=2, max_size=9))
    excess = draw(st.integers(0, sum(room_R)) | st.just(min(sum(room_R), max(room_R) + chunk)))
    mean, excess_R = 100, [rows for rows in (excess, sum(room_R) - excess) if rows]
    home_R = [mean + rows for rows in excess_R] + [mean - room for room in room_R]
    load_E, home_E = [], []
    for rank, rows in enumerate(home_R):
        small = draw(st.integers(0, 2 * chunk))
        load_E += [rows - small, small]
        home_E += [rank, rank]
    return Batch(scattered(load_E, len(home_R), 0), at_homes(home_E, len(home_R))), chunk


@st.composite
def copied_batches(draw: st.DrawFn, max_ranks: int = 8) -> tuple[Batch, tuple[int, ...]]:
    """Any graph of copies, sparse or dense, under any load, and the node of each rank: blocks, mixed or one."""
    ranks, experts, seed = draw(st.integers(1, max_ranks)), draw(st.integers(1, 12)), draw(st.integers(0, 2**16))
    density, most = draw(st.sampled_from([0.1, 0.3, 0.8])), draw(st.sampled_from([1, 9, 5000]))
    rng = np.random.default_rng(seed)
    held_RE = rng.random((ranks, experts)) < density
    held_RE[rng.integers(0, ranks, experts), np.arange(experts)] = True
    load_E = (
        (most + 1) * rng.random(experts) ** rng.choice([0.2, 1.0, 6.0]) * (rng.random(experts) < rng.random() + 0.3)
    )
    batch = Batch(scattered(load_E.astype(np.int64).tolist(), ranks, seed), placed(held_RE))
    node_R = draw(st.sampled_from([[], [rank // 2 for rank in range(ranks)], rng.integers(-2, 2, ranks).tolist()]))
    return batch, tuple(node_R)
