"""Worlds of processes, started once and shared by all tests that want as many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch

from moe import World

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
