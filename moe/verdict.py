"""Verdict: how the survivors of an epoch go on, as the coordinator tells them once all have reported."""

from __future__ import annotations

import time
from functools import partial

from moe.comm import CoordinatorLostError, Membership, View
from moe.recovery import Inventory


def verdict(membership: Membership, number: int, inventory: Inventory, again: float, deadline: float) -> View:
    """The epoch of that number broke. -> a view with a later one, or with what is lost. again: seconds after which the
    report is made once more, as the line may have been cut."""
    while True:
        membership.tell("broken", epoch=number, inventory=inventory.fields())
        left = min(again, max(deadline - time.monotonic(), 0.0))
        try:
            view = membership.wait(partial(_later, number), left)
        except CoordinatorLostError:
            if time.monotonic() > deadline:
                raise
            continue
        if view["lost"] or membership.number not in view["report"]:
            return view
        number = view["epoch"]["number"]  # that one broke too, before this member was in it


def _later(number: int, view: View) -> bool:
    return bool(view["lost"]) or view["epoch"]["number"] > number
