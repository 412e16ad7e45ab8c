"""Named tensors in a folder, by torch.distributed.checkpoint: written by many ranks, read by any number, or by none."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moe.comm.group import Peers, gather_objects

Folder = str | os.PathLike[str]
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
RECORDS = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
)


class Stored(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_tensors(tensors: Mapping[str, Tensor], folder: Folder, peers: Peers) -> None:
    """All ranks' tensors; of a name that several ranks give, one is kept. The folder is whole or not there."""
    target = Path(folder)
    partial = target.with_name(f".{target.name}.partial")
    taken = gather_objects(target.exists(), peers)[0]
    if taken:
        raise ValueError(f"{target} is there already; give a folder that is not")
    if peers.rank == 0 and partial.exists():
        shutil.rmtree(partial)  # of a run that was stopped
    gather_objects(None, peers)
    writer = FileSystemWriter(partial)
    with _alone_on_purpose():
        save(dict(tensors), storage_writer=writer, process_group=peers.group, no_dist=peers.group is None)
    if peers.rank == 0:
        partial.rename(target)
    gather_objects(None, peers)  # no rank goes on before the folder has its name


def read_tensors(tensors: Mapping[str, Tensor], folder: Folder) -> None:
    """Fills the tensors in place; each rank reads what it asks for. Raises where a name or a shape is not there."""
    if tensors:
        with _alone_on_purpose():
            load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=True)


def stored_tensors(folder: Folder) -> dict[str, Stored]:
    """Every tensor in the folder."""
    return Shelf(folder).tensors


class Shelf:
    """A folder of tensors, of which parts are read: any box of any tensor, whoever wrote it in whatever pieces."""

    def __init__(self, folder: Folder) -> None:
        self._reader = _Reader(folder)
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except FileNotFoundError:
            raise ValueError(f"{os.fspath(folder)} holds no checkpoint: its .metadata is missing") from None
        self.tensors = {
            name: Stored(tuple(entry.size), entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str, place: tuple[int, ...] = ()) -> Tensor:
        """place: an index into each of the first dims; the rest is read whole."""
        shape, dtype = self.tensors[name]
        box = torch.empty((1,) * len(place) + shape[len(place) :], dtype=dtype)
        planner = _Box(name, (*place, *(0 for _ in shape[len(place) :])), box)
        with _alone_on_purpose():
            load({name: box}, storage_reader=self._reader, planner=planner, no_dist=True)
        return box.view(shape[len(place) :])


class _Reader(FileSystemReader):
    """Reads the metadata once, and those of hosts that are not installed: they add what is not needed here."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._metadata = _Unpickler(file).load()
            assert isinstance(self._metadata, Metadata)
            self._metadata.storage_meta = getattr(self._metadata, "storage_meta", None) or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _Unpickler(pickle.Unpickler):
    """Records of a checkpoint, and nothing that could run: a folder may be from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        if name.endswith("CoreMetadata"):
            return Metadata
        if module.partition(".")[0] == "pathlib" and name in PATHS:
            return PurePath
        if (module, name) in {("torch", "Size"), ("torch.serialization", "_get_layout")}:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in RECORDS and "." not in name:
            found = super().find_class(module, name)
            if is_dataclass(found) or (isinstance(found, type) and issubclass(found, Enum)):
                return found
        raise ValueError(f"the checkpoint's .metadata asks for {module}.{name}, which is no record of a checkpoint")


class _Box(DefaultLoadPlanner):
    """One tensor's part that begins at these indices."""

    def __init__(self, name: str, start: tuple[int, ...], box: Tensor) -> None:
        super().__init__()
        self._name, self._start, self._box = name, start, box

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        entry = self.metadata.state_dict_metadata[self._name]
        assert isinstance(entry, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(torch.Size(self._start), self._box.shape)
        return LoadPlan(create_read_items_for_chunk_list(self._name, entry, [chunk]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._box


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """torch warns of doing without a process group, even if it was asked to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
