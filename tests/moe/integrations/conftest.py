"""Ranks that have imported transformers before anybody counts the seconds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from moe import World


def warmed(world: Callable[[int], World], prepare: Callable[[], None]) -> Callable[[int], World]:
    """Ranks that have imported a host before anybody counts the seconds."""
    ready: set[int] = set()

    def of(ranks: int) -> World:
        started = world(ranks)
        if ranks not in ready:
            ready.add(ranks)
            usual, started.timeout = started.timeout, timedelta(seconds=200)
            started.run(prepare)
            started.timeout = usual
        return started

    return of


@pytest.fixture(scope="session")
def world(world: Callable[[int], World]) -> Callable[[int], World]:
    return warmed(world, _import_it)


def _import_it() -> None:
    from tests.moe.integrations.tiny import make

    make("mixtral")
