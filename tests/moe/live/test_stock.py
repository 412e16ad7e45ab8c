"""What threads of a member see of its experts while its steps go on, and what is left of one that could not be made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe import Live, MoE, MoEConfig
from moe.comm import Membership, Server, ask
from moe.coordinator import Coordinator
from moe.salvage import Salvage
from moe.stock import Stock
from tests.moe.live.member import even

pytestmark = pytest.mark.fast


def in_a_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    return thread, done


def test_an_expert_is_packed_whole_however_its_layer_changes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup made of the slot that held it a moment ago would be another expert's, and nobody would know."""
    layer = MoE(MoEConfig(dim=4, hidden=4, num_experts=3, top_k=1))
    stock, experts = Stock(layer), layer.experts
    wanted, turned = stock.pack(0, 2), stock.restack(0, (2, 1, 0), {})
    begun, go_on, rehouse = threading.Event(), threading.Event(), experts.rehouse

    def halfway(ids: Any, weights: Any) -> None:
        before = experts.expert_ids
        rehouse(ids, weights)
        experts.expert_ids = before
        begun.set()
        assert go_on.wait(20)
        experts.expert_ids = tuple(ids)

    monkeypatch.setattr(experts, "rehouse", halfway)
    taking, _ = in_a_thread(lambda: stock.take(0, (2, 1, 0), turned))
    assert begun.wait(20)
    packing, packed = in_a_thread(lambda: stock.pack(0, 2))
    restacking, restacked = in_a_thread(lambda: stock.restack(0, (2,), {}))
    packing.join(0.1)
    go_on.set()
    for thread in (taking, packing, restacking):
        thread.join(20)
    assert torch.equal(packed[0], wanted)
    assert torch.equal(restacked[0]["up"][0], turned["up"][0])


def test_backups_are_dropped_between_two_steps_and_by_nobody_else() -> None:
    """A thread of an epoch that broke may still be adding some; it adds to what nobody counts on."""
    salvage = Salvage(None, None)
    of_thread = salvage.kept
    of_thread |= {(0, expert): torch.zeros(1) for expert in range(4)}
    salvage.drop_all_but({(0, 1), (0, 3)})
    of_thread[0, 7] = torch.zeros(1)
    assert salvage.kept.keys() == {(0, 1), (0, 3)}


def test_a_member_whose_model_cannot_be_built_is_no_member() -> None:
    """Else it would be told of as alive for as long as its process lives."""
    server = Server(Coordinator(lease=30.0))
    thread = server.start()
    founder = Membership(server.address, plan=even(6, 1).to_json())

    def build(group: Any, plan: Any) -> MoE:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        Live.join(server.address, build)
    assert sum(thread.name == "membership" for thread in threading.enumerate()) == 1
    assert ask(server.address, "status")["standby"] == []
    founder.close()
    server.stop()
    thread.join()
