"""The compiled deciders decide what the Python ones do, to the bit; and nothing needs them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from placement import RoundRobin, Topology
from routing import (
    DECIDERS,
    Assignment,
    Balancer,
    Bip,
    BreakEven,
    Cutoff,
    EdgeQuantile,
    LeastLoaded,
    Library,
    Quantile,
    Waterfill,
    python_only,
)
from tests.routing.batches import LAW, Batch, batches, copied_batches, crumbs, zipf
from tests.routing.scored import NO_STEPS, popular

pytestmark = pytest.mark.fast


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Batch, LeastLoaded]:
    """Any planner on any batch, copies, nodes and prices included; or a chunk hardly bigger than the room there is."""
    batch, chunk = draw(
        st.one_of(crumbs(), st.tuples(batches(copies=draw(st.booleans())), st.sampled_from([1, 2, 40])))
    )
    ranks = batch.placement.ranks
    nodes = draw(st.one_of(st.just([]), st.lists(st.integers(-2, 2), min_size=ranks, max_size=ranks)))
    return batch, LeastLoaded(
        headroom=draw(st.sampled_from([1, 1.0, 1.01, 1.05, 1.2, 3.0])),
        min_chunk=chunk,
        node_R=tuple(nodes),
        worth=BreakEven(rows=draw(st.sampled_from([0.0, 0.0, 1.0, 7.5]))),
    )


@pytest.mark.usefixtures("compiled")
@settings(LAW, max_examples=150)
@given(tasks())
def test_both_paths_make_the_same_plan(task: tuple[Batch, LeastLoaded]) -> None:
    batch, planner = task
    decided = planner(*batch)
    with python_only():
        assert np.array_equal(decided.quota_RE, planner(*batch).quota_RE)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("num_experts, ranks, per_node", [(8, 4, 2), (16, 8, 4), (64, 8, 4), (256, 64, 8)])
def test_both_paths_make_the_same_plan_of_batches_as_they_are(num_experts: int, ranks: int, per_node: int) -> None:
    topology = Topology.fitting(num_experts=num_experts, ranks=ranks, ranks_per_node=per_node)
    placement = RoundRobin().place(num_experts, topology)
    for seed in range(2000 // num_experts):
        count_RE = zipf(num_experts, ranks, 0.4 + 0.1 * (seed % 10), seed)
        for node_R, chunk, headroom in product(((), topology.node_R), (1, 7, 100), (1.0, 1.05, 1.3)):
            planner = LeastLoaded(headroom=headroom, min_chunk=chunk, node_R=node_R)
            decided = planner(count_RE, placement)
            with python_only():
                assert np.array_equal(decided.quota_RE, planner(count_RE, placement).quota_RE)


@pytest.mark.usefixtures("compiled")
@settings(LAW, max_examples=300)
@given(copied_batches())
def test_both_paths_of_waterfill_give_every_copy_the_same_rows(drawn: tuple[Batch, tuple[int, ...]]) -> None:
    batch, node_R = drawn
    decided = Waterfill(node_R=node_R)(*batch)
    with python_only():
        assert np.array_equal(decided.quota_RE, Waterfill(node_R=node_R)(*batch).quota_RE)


@pytest.mark.usefixtures("compiled")
def test_what_cpp_cannot_read_or_does_not_know_is_planned_in_python() -> None:
    batch = Batch(
        zipf(16, 4, 1.0, 0), RoundRobin().place(16, Topology.fitting(num_experts=16, ranks=4, ranks_per_node=4))
    )
    asked: list[int] = []

    def worth(relief: int, visits: object) -> bool:
        asked.append(relief)
        return True

    want_RE = LeastLoaded()(*batch).quota_RE
    assert np.array_equal(LeastLoaded(worth=worth)(*batch).quota_RE, want_RE)
    assert asked
    read_only_RE = batch.count_RE.copy()
    read_only_RE.setflags(write=False)
    for count_RE in (np.asfortranarray(batch.count_RE), batch.count_RE.astype(np.int32), read_only_RE):
        assert np.array_equal(LeastLoaded()(count_RE, batch.placement).quota_RE, want_RE)
    assert LeastLoaded(min_chunk=10**30)(*batch).loans(batch.placement) == ()


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """Scores and standing prices; in eighths, so that there are ties, or any. Padding, where there is a mask."""
    tokens, experts = draw(st.sampled_from([1, 2, 15, 16, 17, 33, 300, 1500])), draw(st.integers(2, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    score_TE, price_E = torch.rand(tokens, experts, generator=generator), torch.rand(experts, generator=generator) / 4
    if draw(st.booleans()):
        score_TE, price_E = (8 * score_TE).round() / 8, (8 * price_E).round() / 8
    valid_T = None
    if (share := draw(st.sampled_from([None, 0.0, 0.3, 1.0]))) is not None:
        valid_T = torch.rand(tokens, generator=generator) < share
    return score_TE + draw(st.sampled_from([0.0, -0.5])), price_E, draw(st.integers(1, experts)), valid_T


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("balancer", [Bip(), Bip(gauge="none"), Quantile(rounds=3), EdgeQuantile(), Cutoff()], ids=str)
@settings(LAW, max_examples=60)
@given(scores())
def test_both_paths_quote_the_same_prices(balancer: Balancer, task: tuple[Tensor, Tensor, int, Tensor | None]) -> None:
    score_TE, price_E, top_k, valid_T = task
    quoted_E = balancer.quote(score_TE, price_E, top_k, valid_T=valid_T, settled=torch.tensor(0))
    with python_only():
        want_E = balancer.quote(score_TE, price_E, top_k, valid_T=valid_T, settled=torch.tensor(0))
    assert torch.equal(quoted_E, want_E)


@pytest.mark.usefixtures("compiled")
def test_both_paths_quote_the_same_prices_of_batches_as_they_are_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    for seed, (tokens, experts, top_k) in enumerate([(3000, 64, 8), (2048, 128, 16), (999, 32, 17)]):
        score_TE, price_E = popular(tokens, experts, seed).float(), torch.zeros(experts)
        for balancer in (Bip(), Quantile(rounds=2)):
            with python_only():
                want_E = balancer.quote(score_TE, price_E, top_k, valid_T=None, settled=NO_STEPS)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                quoted_E = balancer.quote(score_TE, price_E, top_k, valid_T=None, settled=NO_STEPS)
                torch.set_num_threads(before)
                assert torch.equal(quoted_E, want_E)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("path", ["compiled", "Python"])
def test_an_unlawful_assignment_is_the_same_error_on_both_paths(path: str) -> None:
    table_RE = np.arange(12, dtype=np.int64).reshape(3, 4)
    lost_RE, minus_RE = table_RE.copy(), table_RE.copy()
    lost_RE[1, 2] += 1
    minus_RE[:2, 3] += (-5, 5)

    def check() -> None:
        Assignment(count_RE=table_RE, quota_RE=table_RE[::-1].copy())
        with pytest.raises(ValueError, match="expert 2 was routed 18 rows but assigned 19"):
            Assignment(count_RE=table_RE, quota_RE=lost_RE)
        with pytest.raises(ValueError, match="cannot be negative"):
            Assignment(count_RE=table_RE, quota_RE=minus_RE)

    if path == "compiled":
        check()
    else:
        with python_only():
            check()


def test_without_a_build_everything_runs_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missing = Library(name="missing", sources=DECIDERS.sources, functions={})
    assert missing.load() is None
    assert "not built; run python -m moe.build" in missing.in_use()
    broken = Library(name="broken", sources=DECIDERS.sources, functions={})
    broken.path.parent.mkdir()
    broken.path.write_text("no binary")
    assert broken.load() is None
    assert "does not load" in broken.in_use()
    with python_only():
        assert DECIDERS.load() is None
        assert "python_only" in DECIDERS.in_use()


@pytest.mark.usefixtures("compiled")
def test_a_binary_that_others_may_have_written_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted = DECIDERS.path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = Library(name="copy", sources=DECIDERS.sources, functions=DECIDERS.functions)
    copy.path.parent.mkdir()
    copy.path.write_bytes(trusted.read_bytes())
    copy.path.chmod(0o757)
    assert copy.load() is None
    assert "everybody may write" in copy.in_use()
    monkeypatch.setattr("os.geteuid", lambda: copy.path.stat().st_uid + 1)
    stranger = Library(name="copy", sources=DECIDERS.sources, functions=DECIDERS.functions)
    if copy.path.stat().st_uid:
        assert stranger.load() is None
        assert "belongs to another user" in stranger.in_use()


@pytest.mark.usefixtures("compiled")
def test_a_build_that_fails_says_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "wrong.cpp").write_text("int main() { return wrong; }")
    wrong = Library(name="wrong", sources=(tmp_path / "wrong.cpp",), functions={})
    with pytest.raises(ValueError, match=r"(?s)cannot build wrong.*wrong.cpp:1"):
        wrong.build()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        wrong.build()


def test_other_sources_or_flags_are_another_binary(tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text("// one")
    before = Library(name="one", sources=(source,), functions={}).path
    assert Library(name="one", sources=(source,), functions={}, flags=("-g",)).path != before
    source.write_text("// two")
    assert Library(name="one", sources=(source,), functions={}).path != before
