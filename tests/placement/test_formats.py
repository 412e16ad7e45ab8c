"""Every engine's plans: what goes out comes back, and what an engine cannot take is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement import Packed, Plan, Topology
from placement.formats import ENGINES, read_plan, write_plan
from tests.placement.saved import saved
from tests.placement.strategies import drawn_loads

SINGLE = Topology.even(ranks=4, slots=8, ranks_per_node=4)
COPIES = Topology.even(ranks=4, slots=9, ranks_per_node=4)
SUFFIX = {"trtllm": ".yaml", "vllm": ".npy", "eplb": ".npz", "exflow": ".csv"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_written_for_an_engine_comes_back_as_it_was(tmp_path: Path, engine: str) -> None:
    topology = SINGLE if engine in {"exflow", "megatron"} else COPIES
    plan = Packed()(drawn_loads(0, layers=3), topology)
    path = tmp_path / f"plan{SUFFIX.get(engine, '.json')}"
    beside = write_plan(plan, path, engine)
    assert read_plan(path, 4).placement_L == plan.placement_L
    facts = json.loads(beside.read_text())
    assert facts["provenance"]["trace"] == plan.provenance["trace"]
    assert facts["provenance"]["seed"] == 0
    assert [layer["bound"] for layer in facts["layers"]] == [c.bound for c in plan.certificate_L]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, beside.name])


def deep_model() -> Plan:
    """58 layers of a model of 61 whose first three are dense."""
    trace = replace(drawn_loads(0, layers=58, experts=16), layer_L=tuple(range(3, 61)), layers_in_model=61)
    return Packed()(trace, Topology.even(ranks=4, slots=4, ranks_per_node=4))


def test_sglang_gets_one_key_and_a_row_for_every_layer_dense_ones_too(tmp_path: Path) -> None:
    write_plan(deep_model(), tmp_path / "p.json", "sglang", layers_in_model=61)
    written = json.loads((tmp_path / "p.json").read_text())
    assert list(written) == ["physical_to_logical_map"]
    assert len(written["physical_to_logical_map"]) == 61
    assert all(sorted(row) == list(range(16)) for row in written["physical_to_logical_map"])
    planned = [placement.expert_RS.ravel().tolist() for placement in deep_model().placement_L]
    assert written["physical_to_logical_map"][3:] == planned


def test_tensorrt_llm_gets_the_models_own_layer_numbers(tmp_path: Path) -> None:
    write_plan(deep_model(), tmp_path / "p.yaml", "trtllm")
    lines = (tmp_path / "p.yaml").read_text().splitlines()
    assert lines[0] == "num_slots: 16"
    assert [int(line.split(":")[0]) for line in lines if line.startswith("  ")] == list(range(3, 61))
    assert lines[-1] == "layer_updates_per_iter: 0"
    assert read_plan(tmp_path / "p.yaml", 4).layer_L == tuple(range(3, 61))


def shuffled_ascend(tmp_path: Path) -> tuple[Plan, dict[str, Any]]:
    """Layers 3, 5 and 9, and the devices of each, in some other order."""
    plan = replace(Packed()(drawn_loads(0, layers=3), COPIES), layer_L=(3, 5, 9))
    write_plan(plan, tmp_path / "p.json", "ascend")
    document: dict[str, Any] = json.loads((tmp_path / "p.json").read_text())
    document["layer_list"] = [document["layer_list"][at] for at in (2, 0, 1)]
    for layer in document["layer_list"]:
        layer["device_list"] = [layer["device_list"][at] for at in (1, 3, 0, 2)]
    return plan, document


def test_an_ascend_map_is_read_by_its_numbers_in_whatever_order_it_lists_them(tmp_path: Path) -> None:
    plan, document = shuffled_ascend(tmp_path)
    back = read_plan(saved(tmp_path / "p.json", document), 0)
    assert back.layer_L == (3, 5, 9)
    assert back.placement_L == plan.placement_L


@pytest.mark.parametrize(
    "where, value, message",
    [
        (("layer_list", 0, "layer_id"), 3, "'layer_list[1].layer_id' is 3, as in a layer before it"),
        (("layer_list", 0, "layer_id"), None, "'layer_list[0].layer_id' must be a whole number"),
        (("layer_list", 1, "device_list", 2, "device_id"), 3, "expected each of 0 to 3 once"),
        (("layer_list", 1, "device_list", 2, "device_id"), 4, "expected each of 0 to 3 once"),
        (("layer_list", 1, "device_list", 2, "device_expert"), "all", "device_expert' must be a table of numbers"),
        (("layer_list", 1, "device_count"), 5, "'layer_list[1].device_count' is 5, but 4 are listed"),
        (("moe_layer_count",), 4, "'moe_layer_count' is 4, but 3 are listed"),
        (("layer_list", 2, "device_list"), [], "'layer_list[2].device_list' must be a list, and not an empty one"),
        (("layer_list",), [], "'layer_list' must be a list, and not an empty one"),
        (("layer_list",), 5, "'layer_list' must be a list, and not an empty one"),
    ],
)
def test_an_ascend_map_that_contradicts_itself_is_refused(
    tmp_path: Path, where: tuple[Any, ...], value: Any, message: str
) -> None:
    _, document = shuffled_ascend(tmp_path)
    inner: Any = document
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    with pytest.raises(ValueError) as caught:
        read_plan(saved(tmp_path / "p.json", document), 0)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "p.json"))


def test_a_plan_that_an_engine_cannot_take_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    uneven = Packed()(drawn_loads(0, layers=1), Topology(slots_R=(9, 8, 8, 8), ranks_per_node=4))
    with pytest.raises(ValueError, match="need as many experts on every rank; this plan has 8 to 9"):
        write_plan(uneven, tmp_path / "p.json", "sglang")
    with pytest.raises(ValueError, match="no room for copies"):
        write_plan(Packed()(drawn_loads(0, layers=1), COPIES), tmp_path / "p.json", "megatron")
    with pytest.raises(ValueError, match="'hal' is not an engine"):
        write_plan(uneven, tmp_path / "p.json", "hal")
    assert not list(tmp_path.iterdir())


def test_a_plan_and_its_sidecar_are_written_both_or_neither_and_the_error_names_the_users_path(tmp_path: Path) -> None:
    plan = Packed()(drawn_loads(0, layers=1), COPIES)
    (tmp_path / "z.json.sidecar.json").mkdir()
    with pytest.raises(OSError) as caught:
        write_plan(plan, tmp_path / "z.json", "plan")
    assert caught.value.filename == str(tmp_path / "z.json.sidecar.json")
    assert [path.name for path in tmp_path.iterdir()] == ["z.json.sidecar.json"]
    with pytest.raises(FileNotFoundError) as missing:
        write_plan(plan, tmp_path / "no" / "p.json", "plan")
    assert missing.value.filename == str(tmp_path / "no" / "p.json")


def test_the_eplb_triple_tells_one_story(tmp_path: Path) -> None:
    write_plan(Packed()(drawn_loads(0, layers=2), COPIES), tmp_path / "p.npz", "eplb")
    tables = np.load(tmp_path / "p.npz")
    for layer, expert in np.ndindex(*tables["logcnt"].shape):
        slots = tables["log2phy"][layer, expert]
        assert (tables["phy2log"][layer, slots[slots >= 0]] == expert).all()
        assert (slots >= 0).sum() == tables["logcnt"][layer, expert]
