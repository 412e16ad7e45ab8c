"""Every engine's recordings: what goes in is counted right, what is damaged or somebody else's is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from placement.formats import read_trace, read_traces
from tests.placement.saved import saved
from tests.placement.strategies import choices

COUNT = np.array([[[0, 0, 0], [4, 1, 7]], [[0, 0, 0], [2, 2, 0]], [[0, 0, 0], [0, 0, 0]]])


@pytest.mark.parametrize("suffix", [".pt", ".json", ".npz"])
def test_sglang_counts_leave_out_dense_layers_and_idle_steps(tmp_path: Path, suffix: str) -> None:
    value: Any = {".pt": torch.tensor(COUNT), ".json": COUNT.tolist(), ".npz": COUNT}[suffix]
    trace = read_trace(saved(tmp_path / f"t{suffix}", {"logical_count": value}))
    np.testing.assert_array_equal(trace.load_WLE, [[[4, 1, 7]], [[2, 2, 0]]])
    assert (trace.layer_L, trace.layers_in_model) == ((1,), 2)


def test_sglang_passes_are_added_up_over_ranks_and_mapped_to_experts(tmp_path: Path) -> None:
    records = [
        {"forward_pass_id": p, "rank": r, "global_physical_count": torch.tensor([[1 + r, 2, 3, 4]])}
        for p in (7, 8)
        for r in (0, 1)
    ]
    value = {"records": records, "last_physical_to_logical_map": torch.tensor([[0, 1, 2, 0]])}
    trace = read_trace(saved(tmp_path / "t.pt", value))
    np.testing.assert_array_equal(trace.load_WLE, [[[11, 4, 6]]] * 2)


def sglang_ranks(tmp_path: Path, record: Callable[[int, int], dict[str, Any]]) -> list[Path]:
    """A file for each of two ranks, passes 7 and 8; the passes of rank 1 in the other order."""
    paths = []
    for rank, passes in ((0, (7, 8)), (1, (8, 7))):
        records = [{"forward_pass_id": p, "rank": rank, **record(p, rank)} for p in passes]
        value = {"records": records, "last_physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 0]]}
        paths.append(saved(tmp_path / f"{rank}.json", value))
    return paths


def test_sglang_files_of_the_ranks_of_one_recording_are_added_up_pass_by_pass(tmp_path: Path) -> None:
    """Layer 1 is dense on rank 0's passes alone: it is a layer all the same."""

    def record(passed: int, rank: int) -> dict[str, Any]:
        return {"global_physical_count": [[passed, 1, rank, 0], [0, 0, 2 * rank, rank]]}

    (trace,) = read_traces(sglang_ranks(tmp_path, record))
    np.testing.assert_array_equal(trace.load_WLE, [[[14, 2, 1], [3, 0, 0]], [[16, 2, 1], [3, 0, 0]]])


def test_sglang_tokens_of_all_ranks_are_one_window_a_pass(tmp_path: Path) -> None:
    def record(passed: int, rank: int) -> dict[str, Any]:
        return {"topk_ids_of_layer": [[[passed - 7]], [[rank]]]}

    (trace,) = read_traces(sglang_ranks(tmp_path, record))
    assert trace.window_T is not None
    assert trace.expert_TLK is not None
    assert trace.window_T.tolist() == [0, 0, 1, 1]
    assert trace.expert_TLK[:, :, 0].tolist() == [[0, 2], [0, 1], [1, 2], [1, 1]]


def test_a_rank_of_one_recording_given_twice_is_refused(tmp_path: Path) -> None:
    one, _ = sglang_ranks(tmp_path, lambda passed, rank: {"global_physical_count": [[1] * 4] * 2})
    copied = saved(tmp_path / "again.json", one.read_text())
    with pytest.raises(ValueError, match=r"again\.json: pass 7 of rank 0 is in another file as well"):
        read_traces([one, copied])


def test_megatron_files_of_the_ranks_of_one_recording_are_one_trace(tmp_path: Path) -> None:
    lines = [
        {"step": step, "layer": layer, "rank": rank, "top_indices": [[(step + layer + rank) % 3], [2]]}
        for rank in (0, 1)
        for step in (5, 6)
        for layer in (1, 2)
    ]
    texts = ["\n".join(json.dumps(line) for line in part) for part in (lines, lines[:4], lines[4:])]
    together, *ranks = (saved(tmp_path / f"{name}.jsonl", text) for name, text in zip("abc", texts, strict=True))
    (trace,) = read_traces(ranks)
    assert trace.fingerprint == read_trace(together).fingerprint
    assert trace.windows == 2
    with pytest.raises(ValueError, match="step 5, rank 0, layer 1 is in another file as well"):
        read_traces([together, ranks[0]])


def test_files_that_are_no_ranks_of_one_recording_stay_recordings_of_their_own(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{n}.json", {"logical_count": [[n, 1]]}) for n in (1, 2)]
    assert [trace.load_LE.tolist() for trace in read_traces(paths)] == [[[1, 1]], [[2, 1]]]


def test_sglang_tokens_are_followed_and_padding_is_none(tmp_path: Path) -> None:
    slots = torch.tensor([[[0, 3], [1, 2], [-1, -1]], [[2, 1], [0, 1], [-1, -1]]])
    value = {
        "records": [{"forward_pass_id": 3, "rank": 0, "topk_ids_of_layer": slots}],
        "last_physical_to_logical_map": torch.tensor([[0, 1, 2, 1], [2, 1, 0, 1]]),
    }
    trace = read_trace(saved(tmp_path / "t.pt", value))
    assert trace.expert_TLK is not None
    assert trace.expert_TLK.tolist() == [[[0, 1], [0, 1]], [[1, 2], [2, 1]]]


def test_a_vllm_window_is_mapped_to_experts(tmp_path: Path) -> None:
    window, expert = np.array([[[1, 2, 3]], [[0, 0, 0]]]), np.array([[1, 0, 1]])
    value = {"expert_load_window": window, "physical_to_logical_map": expert}
    trace = read_trace(saved(tmp_path / "t.npz", value))
    np.testing.assert_array_equal(trace.load_WLE, [[[2, 4]]])


def test_a_tensorrt_llm_folder_is_added_up_over_ranks(tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text('{"num_experts": 3, "num_experts_per_token": 1}')
    for rank in (0, 1):
        tensors = {"10_4": np.array([1, 2, 3]), "11_4": np.array([0, rank, 0]), "10_4_raw": np.array([[9, 9]])}
        save_file(tensors, tmp_path / f"rank{rank}.safetensors")
    trace = read_trace(tmp_path)
    np.testing.assert_array_equal(trace.load_WLE, [[[2, 4, 6]], [[0, 1, 0]]])
    assert trace.layer_L == (4,)


def test_a_megatron_router_trace_is_followed_across_layers_and_ranks(tmp_path: Path) -> None:
    lines = [
        {"step": 5, "block": 0, "layer": layer, "rank": rank, "top_indices": [[(layer + rank) % 3], [2]]}
        for layer in (1, 2)
        for rank in (0, 1)
    ]
    lines.append({"step": 5, "block": 0, "layer": 1, "rank": 0, "mtp_idx": 0, "top_indices": [[0], [0]]})
    path = saved(tmp_path / "t.jsonl", "\n".join(json.dumps(line) for line in lines[:4]))
    trace = read_trace(path)
    assert trace.expert_TLK is not None
    assert trace.expert_TLK[:, :, 0].tolist() == [[1, 2], [2, 2], [2, 0], [2, 2]]
    assert trace.layer_L == (1, 2)
    predicted = read_trace(saved(tmp_path / "m.jsonl", "\n".join(json.dumps(line) for line in lines)))
    assert predicted.layer_L == (1, 2, 3)
    assert predicted.expert_TLK is None
    np.testing.assert_array_equal(predicted.load_LE, [[0, 1, 3], [1, 0, 3], [2, 0, 0]])


def test_tall_tables_of_choices_and_wide_tables_of_weights_are_told_apart(tmp_path: Path) -> None:
    choice = np.array([[0, 1], [1, 1], [0, 2]])
    assert read_trace(saved(tmp_path / "exflow.npy", choice)).load_LE.tolist() == [[2, 1, 0], [0, 2, 1]]
    weight = np.array([[4.0, 0, 1], [1, 1, 1]])
    for path, value in (("w.npy", weight), ("w.pt", torch.tensor(weight)), ("w.json", weight.tolist())):
        np.testing.assert_array_equal(read_trace(saved(tmp_path / path, value)).load_LE, weight)


def test_generic_tables_are_read(tmp_path: Path) -> None:
    wide = read_trace(saved(tmp_path / "wide.csv", "e0,e1\n1,2\n3,4\n"))
    np.testing.assert_array_equal(wide.load_LE, [[1, 2], [3, 4]])
    long = read_trace(saved(tmp_path / "long.csv", "window,layer,expert,load\n0,0,1,5\n1,0,0,2\n"))
    np.testing.assert_array_equal(long.load_WLE, [[[0, 5]], [[2, 0]]])
    ids = choices(0, tokens=5, layers=2, experts=3, top_k=2).expert_TLK
    named = {"law_ids": ids, "code_ids": ids, "law_seqlen": np.array([5]), "num_experts": 9}
    tasks = read_trace(saved(tmp_path / "t.npz", named))
    assert tasks.name_W == ("code", "law")
    assert tasks.num_experts == 9
    native = choices(1, tokens=5, layers=2, experts=3, top_k=2)
    native.save(tmp_path / "ours.npz")
    assert read_trace(tmp_path / "ours.npz").fingerprint == native.fingerprint


@pytest.mark.parametrize("header", ["", "0,1\n", "expert_0,expert_1\n", "e0,e1\n"])
def test_a_csv_of_loads_is_told_by_its_header_or_has_none(tmp_path: Path, header: str) -> None:
    np.testing.assert_array_equal(
        read_trace(saved(tmp_path / "t.csv", f"{header}1,2\n3,4\n")).load_LE, [[1, 2], [3, 4]]
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,age,height\n1,30,170\n2,40,180\n", "found the columns 'id', 'age', 'height'; expected layer, expert"),
        (",0,1\n0,1,2\n1,3,4\n", "found the columns '', '0', '1'; expected layer, expert, load"),
        ("expert_1,expert_0\n1,2\n", "found the columns 'expert_1', 'expert_0'"),
        ("layer,count\n0,3\n", "found the columns 'layer', 'count'"),
        ("layer,expert,load,price\n0,0,3,4\n", "found the columns layer, expert, load, price"),
        ("e0,e1,e2\n1,2\n3,4\n", "line 2 has 2 columns, not 3"),
    ],
)
def test_somebody_elses_csv_is_refused_by_its_columns(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_trace(saved(tmp_path / "t.csv", text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("t.json", '{"logical_count": [[1, 2], [3]]}', "'logical_count' is ragged"),
        ("t.json", '{"logical_count": [[1, -2]]}', "'logical_count' holds the negative number -2"),
        ("t.json", '{"logical_count": [[1, NaN]]}', "'logical_count' holds nan; expected finite numbers"),
        ("t.json", '{"logical_count": [[0, 0]]}', "'logical_count' is zero everywhere"),
        ("t.json", '{"logical_count": "many"}', "'logical_count' must be a table of numbers"),
        ("t.json", '{"logical_count": [[1, 2]', "not JSON"),
        ("t.json", '{"foreign": 1}', "expected one of load_WLE"),
        ("t.json", '{"layer_L": [0], "layers": []}', "this is a plan, where a trace was expected"),
        (
            "t.md",
            "# Read me",
            "not JSON: Expecting value: line 1 column 1 (char 0); a file that is no .npz, .npy, .csv",
        ),
        ("t.json", "", "the file is empty"),
        ("t.json", "[[0, 0], [1, 1]]", "zero for every expert of layer 0"),
        ("t.csv", "1,2\n3,x\n", "line 2: 'x' is not a number"),
        ("t.csv", "1,2\n3\n", "'rows' is ragged"),
        ("t.csv", "1,2\n3,nan\n", "'rows' holds nan"),
        ("t.jsonl", '{"step": 1}\n', "line 1: field 'layer' is missing"),
        ("t.jsonl", "{torn", "line 1: not JSON"),
        ("t.npy", "\x93NUMPY torn", "not an .npy file"),
        ("t.npz", "PK torn", "not an .npz file"),
        ("t.pt", "PK torn", "not a torch file"),
    ],
)
def test_a_damaged_recording_is_one_line_that_names_file_and_field(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(value, encoding="latin-1")
    with pytest.raises(ValueError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(path))
    assert "\n" not in text


def test_a_damaged_folder_names_the_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"meta_info\.json is missing"):
        read_trace(tmp_path)
    (tmp_path / "meta_info.json").write_text('{"num_experts": 3}')
    (tmp_path / "rank0.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"rank0\.safetensors: not a safetensors file"):
        read_trace(tmp_path)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "t.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not a torch file"):
        read_trace(tmp_path / "t.pt")
    assert not (tmp_path / "sprung").exists()
