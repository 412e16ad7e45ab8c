"""Claim: where links between hosts are slow, assigners and copies that know the hosts send less over them.

    python -m scripts.bench.hosts [--mbit 1000] [--tokens 512] [--rounds 5]

Two hosts made of network namespaces (Linux, root), two ranks on each, one link of limited speed between them. A layer
of 16 experts, top-4, dim 512, hidden 1024. Bytes are what the kernel counted on the link of host 0, both ways. Ratios
are to the first row of a table, medians over rounds in which the candidates take turns; "again" is the first once more.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moe import MoE, MoEConfig, nodes_of
from placement import LoadTrace, Packed, Placement, Topology
from routing import Assigner, AtHome, LeastLoaded, NearestCopy, Waterfill
from scripts.bench.layer import TOP_K, Told
from scripts.bench.loads import LOADS, Case
from scripts.bench.table import finish, median_ratio, parser, rounds, show
from scripts.hosts import Hosts

RANKS = 2
CONFIG = MoEConfig(dim=512, hidden=1024, num_experts=16, top_k=TOP_K)
Table = dict[str, dict[str, list[float]]]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--mbit", type=int, default=1000, help="speed of the link between the hosts")
    arguments.add_argument("--tokens", type=int, default=512, help="of each rank")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--loads", nargs="+", choices=[*LOADS], default=["zipf", "95:4", "drift"], metavar="LOAD")
    given = arguments.parse_args()
    words = ["-m", "scripts.bench.hosts", "worker", str(given.tokens), str(given.rounds), *given.loads]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are taken down whoever ends this
    with Hosts(2, mbit=given.mbit) as hosts:
        jobs = hosts.torchrun(RANKS, words, {})
        told, rest = jobs[0].communicate(timeout=900)[0], [job.communicate(timeout=60)[0] for job in jobs[1:]]
    if any(job.returncode for job in jobs):
        raise SystemExit("\n".join([told, *rest]))
    for line in told.splitlines():
        if line.startswith("{"):
            print_table(json.loads(line), given.mbit)
    finish(given)


def print_table(seen: dict[str, Table], mbit: int) -> None:
    for title, measured in seen.items():
        first = next(iter(measured.values()))
        rows = []
        for name, own in measured.items():
            ratios = [median_ratio(own[what], first[what]) for what in ("bytes", "seconds")]
            rows.append([name, statistics.median(own["bytes"]) / 1e6, *ratios])
        heads = ["assigner", "MB over the link a step", "× the first", "step time, × the first"]
        show(f"{title}, two hosts of {RANKS} ranks, {mbit} Mbit/s between them", heads, rows)


def worker(num_tokens: int, count: int, loads: Sequence[str]) -> None:
    """On every rank of both hosts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    node_R = nodes_of(dist.group.WORLD)
    case = Case(ranks=2 * RANKS, experts=CONFIG.num_experts, top_k=TOP_K, tokens=num_tokens)
    for name in loads:
        for title, layers, told, backward in (training(name, case, node_R), inference(name, case, node_R)):
            measured = measure(layers, told, num_tokens, count, backward)
            if dist.get_rank() == 0:
                print(json.dumps({f"{title}, {name}": measured}), flush=True)
    dist.destroy_process_group()


Candidates = tuple[str, dict[str, MoE], Told, bool]


def training(name: str, case: Case, node_R: tuple[int, ...]) -> Candidates:
    """Forward and backward, experts visit."""
    blind = LeastLoaded(headroom=1.05, min_chunk=64)
    assigners: dict[str, Assigner] = {
        "at home": AtHome(),
        "again": AtHome(),
        "least-loaded, hosts unknown": blind,
        "least-loaded, same host first": replace(blind, node_R=node_R),
    }
    told, home = Told(expert_STK=LOADS[name].choices(case, dist.get_rank())), even_home(case)
    return "Forward + backward", {who: build(assigner, home, told) for who, assigner in assigners.items()}, told, True


def inference(name: str, case: Case, node_R: tuple[int, ...]) -> Candidates:
    """Forward, two slots a rank more than experts need, filled with copies for this load."""
    told = Told(expert_STK=LOADS[name].choices(case, dist.get_rank()))
    load_E = sum(
        np.bincount(step.flatten().numpy(), minlength=case.experts)
        for rank in range(case.ranks)
        for step in LOADS[name].choices(case, rank)
    )
    trace = LoadTrace(load_WLE=np.asarray(load_E)[None, None])
    blind, copies = (
        Packed()(trace, Topology.even(ranks=case.ranks, slots=case.per_rank + 2, ranks_per_node=size)).placement_L[0]
        for size in (case.ranks, RANKS)
    )
    candidates: dict[str, tuple[Assigner, Placement]] = {
        "at home, no copies": (AtHome(), even_home(case)),
        "again": (AtHome(), even_home(case)),
        "nearest copy, hosts unknown": (NearestCopy(), blind),
        "nearest copy, same host first": (NearestCopy(node_R=node_R), blind),
        "nearest copy, same host first, so is the plan": (NearestCopy(node_R=node_R), copies),
        "waterfill, hosts unknown": (Waterfill(), blind),
        "waterfill, same host first": (Waterfill(node_R=node_R), blind),
        "waterfill, same host first, so is the plan": (Waterfill(node_R=node_R), copies),
    }
    return "Forward", {who: build(*candidate, told) for who, candidate in candidates.items()}, told, False


def even_home(case: Case) -> Placement:
    return Placement(expert_RS=np.arange(case.experts).reshape(case.ranks, -1))


def build(assigner: Assigner, placement: Placement, told: Told) -> MoE:
    torch.manual_seed(0)
    return MoE(replace(CONFIG, assigner=assigner, select=told), dist.group.WORLD, placement)


def measure(layers: Mapping[str, MoE], told: Told, num_tokens: int, count: int, backward: bool) -> Table:
    bytes_of: dict[str, list[float]] = {name: [] for name in layers}
    x_TD = torch.randn(num_tokens, CONFIG.dim, requires_grad=backward)

    def timed(name: str, layer: MoE) -> Callable[[], float]:
        def once() -> float:
            layer.zero_grad(set_to_none=True)
            dist.barrier()
            sent, start = over_the_link(), time.perf_counter()
            with torch.set_grad_enabled(backward):
                y_TD = layer(x_TD)
            if backward:
                y_TD.sum().backward()
            dist.barrier()
            seconds = time.perf_counter() - start
            bytes_of[name].append(over_the_link() - sent)
            return seconds

        return once

    steps = list(told.expert_STK)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for step in steps:
        told.expert_STK[0] = step
        for name, taken in rounds({name: timed(name, layer) for name, layer in layers.items()}, count).items():
            seconds[name] += taken
    warm = count + 1  # the first round of each step is not timed
    bytes_of = {name: [b for i, b in enumerate(all_) if i % warm] for name, all_ in bytes_of.items()}
    return {name: {"seconds": seconds[name], "bytes": bytes_of[name]} for name in layers}


def over_the_link() -> float:
    """Bytes that this host's link has carried so far, both ways."""
    folder = Path("/sys/class/net/eth0/statistics")
    return float(sum(int((folder / name).read_text()) for name in ("rx_bytes", "tx_bytes")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        assert "RANK" in os.environ
        worker(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main()
