"""Worlds of processes, started once and shared by all tests that want as many ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch

from moe import World
from moe.build import LIBRARIES
from routing.native import COMPILERS

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """world(4).run(function, ...) -> the results of four ranks. A hang fails the test within seconds."""
    worlds: dict[int, World] = {}

    def of(ranks: int) -> World:
        if ranks not in worlds:
            worlds[ranks] = World(ranks, timeout=timedelta(seconds=40))
        return worlds[ranks]

    yield of
    for started in worlds.values():
        started.close()


@pytest.fixture(scope="session")
def compiled() -> None:
    """The compiled path is there: built, if need be."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip(f"no C++ compiler among {', '.join(COMPILERS)}")
    for library in LIBRARIES:
        library.build()
        assert library.in_use().startswith("compiled"), library.in_use()
