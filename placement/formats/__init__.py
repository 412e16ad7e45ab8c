"""Files of other engines: recordings in, plans out, and plans back in. One module an engine.

What a file holds is told from its name and its fields; nothing in it is executed. Every error names file and field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from placement.files import write_all
from placement.formats import deepseek, exflow, megatron, sglang, table, trtllm, vllm
from placement.formats.source import open_values
from placement.plan import SCHEMA, Plan
from placement.trace import LoadTrace

ENGINES = ("sglang", "trtllm", "vllm", "ascend", "eplb", "exflow", "megatron", "plan")


def read_trace(path: str | os.PathLike[str]) -> LoadTrace:
    """A recording by any engine, or a trace of our own."""
    (trace,) = read_traces([Path(path)])
    return trace


def read_traces(paths: Sequence[Path]) -> list[LoadTrace]:
    """The recordings in some files. Where an engine writes a file for each rank, the ranks' files are one recording:
    their passes or steps are added up. All other files are a recording each.
    """
    traces: list[LoadTrace] = []
    rank_files: list[tuple[object, Path]] = []
    lines = [path for path in paths if path.suffix == ".jsonl" and not path.is_dir()]
    for path in paths:
        if path in lines:
            continue
        with _named(path):
            values = None if path.is_dir() or path.suffix == ".csv" else open_values(path)
            if sglang.ranks_of_one(values):
                rank_files.append((values, path))
            else:
                traces.append(_recording(values, path))
    if rank_files:
        with _named(rank_files[0][1], *(path for _, path in rank_files)):
            traces.append(sglang.read_ranks(rank_files))
    if lines:
        with _named(*lines):
            traces.append(megatron.read(lines))
    return traces


@contextmanager
def _named(path: Path, *others: Path) -> Iterator[None]:
    """Every error begins with the file it is about."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(tuple(str(name) for name in (path, *others))):
            raise
        raise ValueError(f"{path}: {error}") from None


def _recording(values: object, path: Path) -> LoadTrace:
    if path.is_dir():
        return trtllm.read(path)
    if path.suffix == ".csv":
        return table.read_csv(path)
    if not isinstance(values, dict):
        return _table(values, path)
    if "schema" in values and path.suffix == ".npz":
        return LoadTrace.load(path)
    for engine in (sglang, vllm):
        if engine.knows(values):
            trace: LoadTrace = engine.read(values, path)
            return trace
    return table.read_npz(values, path)


def _table(values: object, path: Path) -> LoadTrace:
    if path.suffix == ".npy" and getattr(values, "ndim", 0) == 2:
        rows, columns = values.shape  # type: ignore[attr-defined]
        # Tokens outnumber layers; experts outnumber layers. A weight tensor is wide, a list of choices is tall.
        if rows > columns and values.dtype.kind in "iu":  # type: ignore[attr-defined]
            return exflow.read(values, path)
    return deepseek.read(values, path)


def write_plan(plan: Plan, path: str | os.PathLike[str], engine: str, *, layers_in_model: int = 0) -> Path:
    """The plan as that engine reads it, and beside it a sidecar of where it came from and what it proves: its path.

    Everything is made before anything is written.
    """
    writers = {
        "sglang": lambda: sglang.write(plan, layers_in_model),
        "trtllm": lambda: trtllm.write(plan),
        "vllm": lambda: vllm.write(plan),
        "ascend": lambda: vllm.write_ascend(plan),
        "eplb": lambda: deepseek.write_triple(plan),
        "exflow": lambda: exflow.write(plan),
        "megatron": lambda: megatron.write(plan),
        "plan": lambda: plan.to_json().encode(),
    }
    if engine not in writers:
        raise ValueError(f"{engine!r} is not an engine this writes for; use one of {', '.join(ENGINES)}")
    content, beside = writers[engine](), Path(f"{os.fspath(path)}.sidecar.json")
    write_all({Path(path): content, beside: sidecar(plan, engine)})
    return beside


def sidecar(plan: Plan, engine: str) -> bytes:
    """Hash of the trace, seed, and each layer's bound and gap."""
    layers = [
        {"layer": layer, "bound": c.bound, "gap": c.gap, "method": c.method, "status": c.status}
        for layer, c in zip(plan.layer_L, plan.certificate_L, strict=False)
    ]
    document = {
        "engine": engine,
        "fingerprint": plan.fingerprint,
        "provenance": dict(sorted(plan.provenance.items())),
        "layers": layers,
    }
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def read_plan(path: str | os.PathLike[str], ranks: int) -> Plan:
    """A plan of ours or of any engine; ranks is needed where the file does not say how its slots are shared out."""
    path = Path(path)
    with _named(path):
        return _plan(path, ranks)


def _plan(path: Path, ranks: int) -> Plan:
    if path.suffix in {".yaml", ".yml"}:
        return trtllm.read_plan(path, ranks)
    if path.suffix == ".csv":
        return exflow.read_plan(path, ranks)
    values = open_values(path)
    if not isinstance(values, dict):
        return vllm.read_plan(values, path, ranks)
    if values.get("schema") == SCHEMA:
        return Plan.load(path)
    readers = {sglang.KEY: sglang.read_plan, megatron.KEY: megatron.read_plan, deepseek.KEY: deepseek.read_plan}
    for key, read in readers.items():
        if key in values:
            return read(values, path, ranks)
    return vllm.read_ascend(values, path)
