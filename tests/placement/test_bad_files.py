"""Files that cannot be read: one line that names the file and the field, whatever is in them; never a traceback."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.formats import read_plan, read_trace

LINE = {"step": 0, "layer": 0, "rank": 0, "top_indices": [[0, 1]]}
MAP = {"last_physical_to_logical_map": [[0, 1]]}
DEEP = "[" * 100_000


def npy(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def passes(*records: Any) -> dict[str, Any]:
    return {"records": list(records), **MAP}


RECORDINGS: list[tuple[str, Any, str]] = [
    ("m.jsonl", LINE | {"layer": None}, "'layer, line 1' must be a whole number; got 'None'"),
    ("m.jsonl", LINE | {"step": "a"}, "'step, line 1' must be a whole number; got 'a'"),
    ("m.jsonl", LINE | {"layer": -3}, "'layer, line 1' is -3"),
    ("m.jsonl", LINE | {"layer": 10**400}, "'layer, line 1' is 1000"),
    ("m.jsonl", LINE | {"mtp_idx": "x"}, "'mtp_idx, line 1' must be a whole number"),
    ("m.jsonl", LINE | {"top_indices": [[2 * 10**9, 1]]}, "'top_indices, line 1' holds 2e+09; expected numbers below"),
    ("m.jsonl", LINE | {"top_indices": [[-1, -1]]}, "'top_indices' holds no choice"),
    ("m.jsonl", DEEP, "line 1: not JSON: brackets nested too deep"),
    ("s.json", DEEP, "not JSON: brackets nested too deep"),
    ("s.json", '{"logical_count": [[' + "9" * 5000 + "]]}", "not JSON: Exceeds the limit"),
    ("s.json", passes({"forward_pass_id": None, "global_physical_count": [[1, 2]]}), "records[0].forward_pass_id"),
    ("s.json", passes({"forward_pass_id": 0, "rank": [], "global_physical_count": [[1, 2]]}), "records[0].rank"),
    ("s.json", passes({"forward_pass_id": 0, "global_physical_count": [[1]]}), "has shape (1, 1), but the map (1, 2)"),
    ("s.json", passes(1), "'records' must hold a mapping for each pass"),
    ("s.json", passes(), "'records' must be a list, and not an empty one"),
    ("s.json", {"records": [{}], "last_physical_to_logical_map": [[10**11]]}, "holds 1e+11; expected numbers below"),
    ("t.csv", "layer,expert,load\n0,0,1\n0,100000000000,1\n", "'expert' holds 1e+11; expected numbers below 65536"),
    ("t.csv", "window,layer,expert,load\n60000,60000,6,1\n", "fields window, layer, expert span more than"),
    ("t.csv", "layer,expert,load\n0,0,1\n2,0,1\n", "'load' is zero for every expert of layer 1"),
    ("t.csv", "0,0\n3,4\n", "'rows' is zero for every expert of layer 0"),
    ("t.npy", npy(np.full((2, 4), 1e308)), "'weight' holds 1e+308; expected numbers up to 1e+100"),
    ("t.npy", npy(np.zeros((2, 4))), "'weight' is zero for every expert of layer 0"),
    ("t.npy", npy(np.array(3.0)), "'weight' must be a table of numbers in 2 or 3 dimensions"),
    ("t.npy", npy(np.ones((2, 4), dtype=bool)), "'weight' holds true and false; expected numbers"),
    ("s.json", {"logical_count": [[True, False]]}, "'logical_count' holds true and false; expected numbers"),
    ("t.npz", npz(ids=np.ones((4, 2), dtype=bool)), "'ids' holds true and false; expected numbers"),
    ("t.npz", npz(schema="evenmoe.trace/1", load_WLE=np.ones((1, 1, 2), dtype=bool)), "load_WLE must be a table of"),
    ("t.npz", npz(load=np.zeros((2, 4))), "'load' is zero for every expert of layer 0"),
    ("t.npz", npz(ids=np.zeros((4, 2), dtype=int), num_experts=np.array([3, 4])), "'num_experts' must be a whole"),
    ("t.npz", npz(schema="evenmoe.trace/1", load_WLE=np.ones((1, 1, 2)), foo=np.ones(1)), "'foo' is not one of"),
    ("t.npz", npz(schema="evenmoe.trace/1", load_WLE=np.full((1, 1, 2), 1e308)), "load_WLE holds 1e+308"),
    ("t.pt", pickle.dumps({"x": 1}, protocol=4), "not a torch file of tensors"),
]

PLANS: list[tuple[str, Any, str]] = [
    ("p.json", {"layer_list": 5}, "'layer_list' must be a list"),
    ("p.json", {"layer_list": []}, "'layer_list' must be a list, and not an empty one"),
    ("p.json", {"layer_list": [{"layer_id": 0, "device_list": []}]}, "'layer_list[0].device_list' must be a list"),
    ("p.json", {"expert_permutation": {"x": [0, 1]}}, "'expert_permutation' must give a row for each layer's number"),
    ("p.json", {"expert_permutation": []}, "'expert_permutation' must give a row for each layer's number"),
    ("p.json", {"physical_to_logical_map": [[0, 10**11]]}, "holds 1e+11; expected numbers below"),
    ("p.json", DEEP, "brackets nested too deep"),
    ("p.json", {"schema": "evenmoe.plan/1"}, "field 'layers' is missing"),
    ("p.csv", "0,x\n", "expected a rank in every cell"),
    ("p.csv", b"\xff\xfe", "expected a rank in every cell"),
    ("p.yaml", "  0: [[[", "'initial_global_assignments.0' is not a list"),
    ("p.yaml", b"\xff\xfe", "can't decode byte"),
    ("p.npy", npy(np.array([[0, 2]])), "expert 1 has no slot"),
]


def written(path: Path, value: Any) -> Path:
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def one_line(read: Callable[[], object], path: Path, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read()
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value, message", RECORDINGS)
def test_a_recording_that_cannot_be_is_one_line_that_names_file_and_field(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    path = written(tmp_path / name, value)
    one_line(lambda: read_trace(path), path, message)


@pytest.mark.parametrize("name, value, message", PLANS)
def test_a_plan_that_cannot_be_is_one_line_that_names_file_and_field(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    path = written(tmp_path / name, value)
    one_line(lambda: read_plan(path, 2), path, message)
