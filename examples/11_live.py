"""Ranks that come, go and die, while a model serves: two members, a third that joins, one that is killed.

python examples/11_live.py          # with --hold it serves until somebody asks for `moe-elastic scale 0 --at ...`
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor, nn

from moe import Coordinator, Live, MoE, MoEConfig, Server, Terms
from moe.comm import Peers, ask
from placement import Placement, Plan

CONFIG = MoEConfig(dim=32, hidden=64, num_experts=8, top_k=2)
PLAN = Plan(placement_L=(Placement(expert_RS=np.arange(8).reshape(2, 4)),))  # of the two founders


def build(group: Peers, plan: Plan) -> nn.Module:
    torch.manual_seed(0)
    return MoE(CONFIG, group, plan.placement_L[0])


def read(layer: str, expert: int) -> dict[str, Tensor]:
    """Of an expert that no rank has any more: from a checkpoint. Here, as the seed makes it."""
    torch.manual_seed(0)
    return MoE(CONFIG).expert_state()[expert]


def member(address: str, plan: Plan | None, pipe: Connection) -> None:
    torch.set_num_threads(1)
    terms = Terms(timeout=10.0, read=read)
    live = Live.join(address, build, terms) if plan is None else Live.found(address, plan, build, terms)
    pipe.send((live.member, os.getpid()))
    torch.manual_seed(0)
    alone, wrong = MoE(CONFIG), 0
    with torch.inference_mode():
        while live.serves():
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(live.steps))
            y = live.run(lambda: live.model(x))  # noqa: B023  # run calls it now
            wrong += not torch.allclose(y, alone(x), atol=1e-6)
    pipe.send((live.steps, wrong, live.retries))
    live.close()


def main() -> None:
    server = Server(Coordinator())
    server.start()
    print(f"moe-elastic status --at {server.address}", flush=True)
    context, pipes, pids = multiprocessing.get_context("spawn"), {}, {}
    started = []
    for plan in (PLAN, PLAN, None):
        ours, theirs = context.Pipe()
        context.Process(target=member, args=(server.address, plan, theirs), daemon=True).start()
        started.append(ours)
    for pipe in started:
        number, pid = pipe.recv()
        pipes[number], pids[number] = pipe, pid
    for count, doing in ((3, "one joined"), (2, "one was killed"), (0, "the service ended")):
        if doing == "one was killed":
            os.kill(pids.pop(3), signal.SIGKILL)
        elif count or "--hold" not in sys.argv:
            ask(server.address, "scale", op=doing, count=count)
        while (told := ask(server.address, "status"))["phase"] != "IDLE" or len(told["members"]) != count:
            time.sleep(0.05)
        print(f"{doing}: epoch {told['epoch']}, members {told['members']}")
    for number in pids:
        print("member {} did {} steps, {} wrong answers, {} done again".format(number, *pipes[number].recv()))


if __name__ == "__main__":
    main()
