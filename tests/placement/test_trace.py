from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import LoadTrace, merge
from tests.placement.strategies import choices, loads

pytestmark = pytest.mark.fast


@given(loads(windows=3))
def test_a_saved_trace_loads_as_it_was_and_keeps_its_fingerprint(
    tmp_path_factory: pytest.TempPathFactory, trace: LoadTrace
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    trace.save(path)
    back = LoadTrace.load(path)
    np.testing.assert_array_equal(back.load_WLE, trace.load_WLE)
    assert back.fingerprint == trace.fingerprint


def test_a_trace_with_tokens_survives_a_round_trip_to_the_byte(tmp_path: Path) -> None:
    trace = choices(0, tokens=20, layers=3, experts=6, top_k=2)
    trace.save(tmp_path / "a.npz")
    LoadTrace.load(tmp_path / "a.npz").save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@given(st.integers(0, 99), st.integers(1, 3))
def test_counts_are_those_of_a_loop(seed: int, top_k: int) -> None:
    trace = choices(seed, tokens=9, layers=3, experts=5, top_k=top_k)
    assert trace.expert_TLK is not None
    load_LE, pair_LEE, together_LEE = np.zeros((3, 5)), np.zeros((2, 5, 5)), np.zeros((3, 5, 5))
    for token in trace.expert_TLK.tolist():
        for layer, chosen in enumerate(token):
            for e in chosen:
                load_LE[layer, e] += 1
                for f in chosen:
                    together_LEE[layer, e, f] += e != f
                if layer < 2:
                    for f in token[layer + 1]:
                        pair_LEE[layer, e, f] += 1 / top_k**2
    np.testing.assert_array_equal(trace.load_LE, load_LE)
    assert trace.follow_LEE is not None
    np.testing.assert_allclose(trace.follow_LEE, pair_LEE)
    np.testing.assert_array_equal(trace.together_LEE, together_LEE)


def test_a_choice_not_made_counts_for_nothing_and_the_token_still_weighs_one() -> None:
    trace = LoadTrace.from_choices([[[0, -1], [1, 2]], [[-1, -1], [0, 1]]], num_experts=3)
    np.testing.assert_array_equal(trace.load_LE, [[1, 0, 0], [1, 2, 1]])
    assert trace.follow_LEE is not None
    np.testing.assert_allclose(trace.follow_LEE[0], [[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]])


@given(st.integers(1, 40), st.integers(1, 50))
def test_windows_of_tokens_lose_no_row(tokens: int, size: int) -> None:
    trace = choices(1, tokens=tokens, layers=2, experts=4, top_k=2)
    cut = trace.windowed(size)
    np.testing.assert_array_equal(cut.load_LE, trace.load_LE)
    assert cut.windows == max(tokens // size, 1)
    assert cut.load_WLE.sum(axis=2).min() >= 2 * min(size, tokens)


@given(st.integers(2, 9), st.integers(2, 9))
def test_a_split_holds_out_some_windows_and_fits_on_the_others(windows: int, every: int) -> None:
    trace = LoadTrace(load_WLE=np.arange(1.0, windows + 1)[:, None, None], name_W=[str(w) for w in range(windows)])
    fit, held = trace.split(every)
    assert sorted(fit.name_W + held.name_W) == sorted(trace.name_W)
    assert fit.windows >= held.windows >= 1


def test_a_split_takes_the_tokens_along_with_their_windows() -> None:
    trace = choices(2, tokens=40, layers=2, experts=4, top_k=2).windowed(10)
    fit, held = trace.split()
    for half in (fit, held):
        again = LoadTrace.from_choices(half.expert_TLK, num_experts=4, window_T=half.window_T)
        np.testing.assert_array_equal(again.load_WLE, half.load_WLE)


def test_merged_traces_have_the_windows_of_all() -> None:
    one, two = (choices(seed, tokens=8, layers=2, experts=4, top_k=k) for seed, k in ((0, 1), (1, 2)))
    both = merge([one, two])
    assert both.windows == 2
    np.testing.assert_array_equal(both.load_LE, one.load_LE + two.load_LE)
    np.testing.assert_allclose(both.follow_LEE, one.follow_LEE + two.follow_LEE)
    assert both.expert_TLK is not None
    assert both.expert_TLK.shape == (16, 2, 2)


@pytest.mark.parametrize(
    "load, message",
    [
        ([[[1.0, -2.0]]], r"load_WLE\[0, 0, 1\] is negative: -2.0"),
        ([[[1.0, float("nan")]]], r"load_WLE\[0, 0, 1\] is nan"),
        ([[[1.0, 2.0]], [[1.0]]], "every row of one length"),
        ([[[1.0], [0.0]]], "zero for every expert of layer 1"),
        ([[1.0, 2.0]], r"\[windows, layers, experts\]; got shape \(1, 2\)"),
        ([[["a"]]], "table of numbers"),
    ],
)
def test_a_load_that_cannot_be_is_refused_with_its_place(load: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadTrace(load_WLE=load)  # type: ignore[arg-type]


def test_tokens_that_do_not_fit_the_load_are_refused() -> None:
    with pytest.raises(ValueError, match="use an expert's number below 3"):
        LoadTrace.from_choices([[[3]]], num_experts=3)
    with pytest.raises(ValueError, match="whole numbers"):
        LoadTrace.from_choices([[[0.5]]], num_experts=3)
    with pytest.raises(ValueError, match="ascending"):
        LoadTrace(load_WLE=np.ones((1, 2, 2)), layer_L=(4, 3))
    with pytest.raises(ValueError, match="one model"):
        merge([LoadTrace(load_WLE=np.ones((1, 2, 2))), LoadTrace(load_WLE=np.ones((1, 2, 3)))])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not a zip at all"])
def test_a_damaged_file_is_one_clear_error_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "torn.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"torn\.npz: not an \.npz file"):
        LoadTrace.load(tmp_path / "torn.npz")
