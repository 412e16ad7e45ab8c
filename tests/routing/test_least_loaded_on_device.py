"""LeastLoadedOnDevice: what the host planner promises, with no number read back and no shape that depends on one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from placement import Placement
from routing import Assignment, AtHome, BreakEven, LeastLoaded, LeastLoadedOnDevice
from tests.contracts import HARD_BATCHES, check_assigner
from tests.routing.batches import LAW, Batch, at_homes, balanced_batches, batches, contiguous, crumbs, scattered, zipf

pytestmark = pytest.mark.fast

HEADROOMS = st.sampled_from([1.0, 1.01, 1.05, 1.2, 1.5, 3.0])
CHUNKS = st.sampled_from([1, 1, 2, 3, 7, 40, 1000])
PLANNERS = st.builds(LeastLoadedOnDevice, headroom=HEADROOMS, min_chunk=CHUNKS)


@dataclass(frozen=True)
class Assigning:
    """The decision as an Assigner, to hold it to the same contract."""

    decider: LeastLoadedOnDevice

    def __call__(self, count_RE: NDArray[np.int64], placement: Placement) -> Assignment:
        quota_RE = self.decider(torch.from_numpy(count_RE), torch.from_numpy(placement.home_E))
        return Assignment(count_RE=count_RE, quota_RE=quota_RE.numpy())


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Batch, LeastLoadedOnDevice]:
    """A batch without copies and a planner: any of both, or a chunk hardly bigger than the room there is."""
    if draw(st.integers(0, 2)):
        return draw(batches(copies=False)), draw(PLANNERS)
    batch, chunk = draw(crumbs())
    return batch, LeastLoadedOnDevice(headroom=1.0, min_chunk=chunk)


def capacity(planner: LeastLoadedOnDevice, batch: Batch) -> int:
    return math.ceil(planner.headroom * int(batch.load_E.sum()) / batch.placement.ranks)


@pytest.mark.parametrize("name", HARD_BATCHES)
@pytest.mark.parametrize("planner", [LeastLoadedOnDevice(), LeastLoadedOnDevice(headroom=1.0, min_chunk=30)])
def test_the_decision_on_the_device_keeps_the_assigners_contract(planner: LeastLoadedOnDevice, name: str) -> None:
    batch = HARD_BATCHES[name]
    decided = check_assigner(Assigning(planner), batch)
    assert decided.load_R.max() < max(capacity(planner, batch) + planner.min_chunk, 1)


@settings(LAW, max_examples=600)
@given(tasks())
def test_no_rank_exceeds_its_headroom_by_a_chunk(task: tuple[Batch, LeastLoadedOnDevice]) -> None:
    batch, planner = task
    decided = check_assigner(Assigning(planner), batch)
    assert decided.load_R.max() < capacity(planner, batch) + planner.min_chunk


@LAW
@given(tasks())
def test_a_rank_at_or_under_its_capacity_lends_nothing_and_one_above_takes_nothing(
    task: tuple[Batch, LeastLoadedOnDevice],
) -> None:
    batch, planner = task
    decided = Assigning(planner)(*batch)
    for loan in decided.loans(batch.placement):
        assert batch.home_R[loan.lender] >= capacity(planner, batch) + planner.min_chunk
        assert batch.home_R[loan.borrower] < capacity(planner, batch)
    over_R = batch.home_R > capacity(planner, batch)
    assert (decided.load_R >= np.minimum(batch.home_R, capacity(planner, batch)))[over_R].all()


@settings(LAW, max_examples=400)
@given(tasks())
def test_a_visit_brings_half_a_chunk_or_a_whole_expert(task: tuple[Batch, LeastLoadedOnDevice]) -> None:
    batch, planner = task
    decided = Assigning(planner)(*batch)
    for loan in decided.loans(batch.placement):
        brought = decided.quota_RE[loan.borrower, loan.expert]
        assert brought >= planner.min_chunk // 2 or brought == batch.load_E[loan.expert]


def test_what_is_left_of_an_excess_after_whole_experts_stays_if_it_is_below_a_chunk() -> None:
    """53 rows too many, in experts of 50: one leaves, and 3 rows of the next do not."""
    batch = Batch(np.array([[50, 50, 13, 0], [0, 0, 0, 7]]), at_homes([0, 0, 0, 1], 2))
    decided = Assigning(LeastLoadedOnDevice(headroom=1.0, min_chunk=10))(*batch)
    assert decided.load_R.tolist() == [63, 57]
    assert len(decided.loans(batch.placement)) == 1


@settings(LAW, max_examples=400)
@given(batches(copies=False), HEADROOMS)
def test_visits_are_fewer_than_twice_the_host_planners(batch: Batch, headroom: float) -> None:
    device = Assigning(LeastLoadedOnDevice(headroom=headroom))(*batch).loans(batch.placement)
    host = LeastLoaded(headroom=headroom)(*batch).loans(batch.placement)
    assert len(device) <= max(2 * len(host) - 1, 0)


@pytest.mark.parametrize("headroom", [1.0, 1.05])
def test_on_realistic_batches_visits_are_within_a_third_of_the_host_planners(headroom: float) -> None:
    device, host = 0, 0
    for experts, ranks in ((128, 8), (256, 32), (256, 64)):
        for seed, exponent in enumerate((0.5, 0.8, 1.2)):
            batch = Batch(zipf(experts, ranks, exponent, seed, rows=30000), contiguous(experts, ranks))
            planners = (
                LeastLoadedOnDevice(headroom=headroom, min_chunk=200),
                LeastLoaded(headroom=headroom, min_chunk=200),
            )
            device += len(Assigning(planners[0])(*batch).loans(batch.placement))
            host += len(planners[1](*batch).loans(batch.placement))
    assert device <= 4 / 3 * host, f"{device} visits, the host planner makes {host}"


@LAW
@given(balanced_batches(), PLANNERS)
def test_a_balanced_batch_is_assigned_as_at_home(batch: Batch, planner: LeastLoadedOnDevice) -> None:
    assert Assigning(planner)(*batch).quota_RE.tobytes() == AtHome()(*batch).quota_RE.tobytes()


@LAW
@given(batches(copies=False), PLANNERS, st.integers(0, 2**16))
def test_quotas_depend_on_the_loads_alone_not_on_where_rows_come_from(
    batch: Batch, planner: LeastLoadedOnDevice, seed: int
) -> None:
    elsewhere = scattered(batch.load_E.tolist(), batch.placement.ranks, seed)
    assert np.array_equal(Assigning(planner)(elsewhere, batch.placement).quota_RE, Assigning(planner)(*batch).quota_RE)


def test_a_plan_that_spares_less_than_its_visits_cost_is_declined() -> None:
    """300 rows on rank 0, 0 on the others: two visits spare it 200 rows, at up to 100 rows a visit."""
    batch = Batch(np.array([[300], [0], [0]]), at_homes([0], 3))
    for rows, peak in ((99.0, 100), (100.0, 300)):
        decided = Assigning(LeastLoadedOnDevice(headroom=1.0, worth=BreakEven(rows=rows)))(*batch)
        assert decided.load_R.max() == peak


def test_many_rows_do_not_overflow() -> None:
    batch = Batch(np.full((2, 2), 2**30), at_homes([0, 0], 2))
    decided = Assigning(LeastLoadedOnDevice(headroom=1.0, min_chunk=1))(*batch)
    assert decided.load_R.tolist() == [2**31, 2**31]


@dataclass
class Watch(TorchDispatchMode):
    """Notes operators whose result or its shape is known only after the numbers have been read."""

    waits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.waits.append(func.name())
        return func(*args, **(kwargs or {}))


def _reads_a_number(count_RE: torch.Tensor) -> object:
    return count_RE.sum().item()


def _masks(count_RE: torch.Tensor) -> object:
    return count_RE[count_RE > 2]


def _counts(count_RE: torch.Tensor) -> object:
    return torch.bincount(count_RE[0])


@pytest.mark.parametrize("waiting", [_reads_a_number, _masks, _counts, torch.nonzero, torch.unique])
def test_the_watch_sees_what_would_wait(waiting: Callable[[torch.Tensor], object]) -> None:
    with Watch() as watch:
        waiting(torch.arange(6).reshape(2, 3))
    assert watch.waits


@pytest.mark.parametrize("chunk", [1, 100])
def test_nothing_waits_for_a_number(chunk: int) -> None:
    batch = Batch(zipf(24, 6, 1.2, 0), contiguous(24, 6))
    with Watch() as watch:
        decided = Assigning(LeastLoadedOnDevice(min_chunk=chunk))(*batch)
    assert decided.loans(batch.placement), "nothing was decided"
    assert watch.waits == []


def test_tensors_without_numbers_are_enough_to_decide() -> None:
    """On the meta device there is nothing to read, so every shape and every branch is known beforehand."""
    quota_RE = LeastLoadedOnDevice(min_chunk=10)(
        torch.empty(4, 9, dtype=torch.int64, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
    )
    assert quota_RE.shape == (4, 9)
    assert quota_RE.dtype == torch.int64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False")
def test_a_cuda_graph_decides_what_the_cpu_does() -> None:
    planner, placement = LeastLoadedOnDevice(min_chunk=50), contiguous(64, 8)
    home_E, count_RE = torch.from_numpy(placement.home_E).cuda(), torch.zeros(8, 64, dtype=torch.int64, device="cuda")
    planner(count_RE, home_E)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quota_RE = planner(count_RE, home_E)
    for seed in range(3):
        batch = Batch(zipf(64, 8, 1.0, seed), placement)
        count_RE.copy_(torch.from_numpy(batch.count_RE))
        graph.replay()
        assert np.array_equal(quota_RE.cpu().numpy(), Assigning(planner)(*batch).quota_RE)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"headroom": 0.99}, "headroom=0.99.*1 <= headroom"), ({"min_chunk": 0}, "min_chunk=0.*at least 1")],
)
def test_a_planner_that_cannot_be_is_refused_by_the_number_given(options: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LeastLoadedOnDevice(**options)  # type: ignore[arg-type]


def test_a_table_for_other_experts_is_refused_by_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3, 6\) and \(5,\)"):
        LeastLoadedOnDevice()(torch.zeros(3, 6, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
