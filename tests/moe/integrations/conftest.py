"""Ranks that have imported transformers before anybody counts the seconds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from moe import World


@pytest.fixture(scope="session")
def world(world: Callable[[int], World]) -> Callable[[int], World]:
    ready: set[int] = set()

    def of(ranks: int) -> World:
        started = world(ranks)
        if ranks not in ready:
            ready.add(ranks)
            usual, started.timeout = started.timeout, timedelta(seconds=200)
            started.run(_import_it)
            started.timeout = usual
        return started

    return of


def _import_it() -> None:
    from tests.moe.integrations.tiny import make

    make("mixtral")
