"""Named tensors in a folder, by torch.distributed.checkpoint: written by many ranks, read by any number, or by none."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moe.comm.group import Peers, gather_objects

Folder = str | os.PathLike[str]


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
    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(folder)} holds no checkpoint: its .metadata is missing") from None
    return {
        name: Stored(tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """torch warns of doing without a process group, even if it was asked to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
