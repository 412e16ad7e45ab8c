"""Claim: from a choice to the summed results, our experts are close to a dense chain of matmuls and beat their peers.

    python -m scripts.bench.experts [--rounds 5] [--only wide-64x8]

One thread, CPU seconds of the process, so other work on the machine matters little. The floor is two matmuls of all
rows together (six with backward) into memory that is there already: the same FLOPs, no routing, no activation. "by
expert" is the same with each expert's own rows and weights: nothing that multiplies expert by expert can take less.
Every candidate starts from the chosen experts and their weights, sorts, computes and adds up. The peers are
transformers' Qwen3 experts, in a loop ("eager") and grouped, and Megatron-Core's SequentialMLP; each must give what
ours gives before it is timed, and what is not installed is left out and said. A candidate that takes more than five
times the floor is run once, marked "once", and does not hold up the others. "again" is ours a second time: a difference
within |again/ours - 1| is noise. "torch" is ours without the compiled path, whether or not it is built.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
import torch
from torch import Tensor

from moe import Experts, Fastest, Grouped
from moe.blocks import KERNELS
from moe.comm import Peers
from moe.compute import Compute
from moe.dispatch import Dispatch
from moe.guests import Nobody
from placement import RoundRobin, Topology
from routing import AtHome, Choice
from scripts.bench.clock import reason
from scripts.bench.dense import by_expert, dense
from scripts.bench.measured import BACKWARD, FORWARD, Measured, shared
from scripts.bench.peers import FAILURES, MAKERS, Case, Peer, peers_of
from scripts.bench.table import Samples, band, cpu_seconds, in_python, interleaved, median_ratio, show

Run = Callable[[], Tensor | None]
TYPES = (torch.float32, torch.bfloat16)
SLOW = 5.0
CHEAPER = {torch.float32: 1.0, torch.bfloat16: 0.45}
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # others round more often
COLUMNS = ("by expert", "ours", "again", "torch", "grouped", *MAKERS)


@dataclass(frozen=True, kw_only=True)
class Workload:
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def flops(self) -> float:
        """Of a forward, multiplications and additions."""
        return 6.0 * self.rows * self.dim * self.hidden


WORKLOADS = {
    "tiny-8x2": Workload(tokens=4096, dim=512, hidden=1024, experts=8, top_k=2),
    "wide-64x8": Workload(tokens=4096, dim=512, hidden=1024, experts=64, top_k=8),
    "fine-128x8": Workload(tokens=2048, dim=1024, hidden=512, experts=128, top_k=8),
    "decode-256": Workload(tokens=256, dim=512, hidden=1024, experts=8, top_k=2),
}


class Bench:
    """The tensors of one workload and, by name, every way of computing it."""

    def __init__(self, load: Workload, dtype: torch.dtype, *, backward: bool) -> None:
        torch.manual_seed(0)
        self.load, self.dtype, self.backward = load, dtype, backward
        self.experts = Experts(load.dim, load.hidden, range(load.experts), dtype=dtype).requires_grad_(backward)
        score_TE = torch.randn(load.tokens, load.experts).softmax(dim=-1)
        weight_TK, self.expert_TK = score_TE.topk(load.top_k, dim=-1)
        self.weight_TK = (weight_TK / weight_TK.sum(dim=-1, keepdim=True)).requires_grad_(backward)
        self.x_TD = torch.randn(load.tokens, load.dim, dtype=dtype, requires_grad=backward)
        self.dy_TD = torch.randn(load.tokens, load.dim, dtype=dtype)

    def candidates(self) -> dict[str, Run]:
        """The floor, and ours twice."""
        return {"floor": self.floor(), "ours": self.run(Fastest()), "again": self.run(Fastest())}

    def variants(self) -> dict[str, Run]:
        python = {"torch": in_python(self.run(Fastest())), "grouped": in_python(self.run(Grouped()))}
        return {"by expert": self.floor_by_expert(), **python}

    def case(self) -> Case:
        return Case(experts=self.experts, x_TD=self.x_TD, expert_TK=self.expert_TK, weight_TK=self.weight_TK)

    def peers(self) -> tuple[dict[str, Run], dict[str, str]]:
        """Those that can be made, and why others cannot."""
        found, absent = peers_of(self.case())
        return {name: self._timed(peer) for name, peer in found.items()}, absent

    def run(self, compute: Compute) -> Run:
        return self._timed(Peer(self.ours(compute), self.experts))

    def ours(self, compute: Compute) -> Callable[[], Tensor]:
        """From what a router chose to y, on one process, as the layer does it."""
        peers, load = Peers.of(None), self.load
        home = RoundRobin().place(load.experts, Topology.fitting(num_experts=load.experts, ranks=1, ranks_per_node=1))
        token_N = torch.arange(load.tokens).repeat_interleave(load.top_k)
        price_E, score_TE = torch.zeros(load.experts), torch.zeros(load.tokens, load.experts)

        def run() -> Tensor:
            expert_N, weight_N = self.expert_TK.flatten(), self.weight_TK.flatten()
            choice = Choice(
                token_N=token_N,
                expert_N=expert_N,
                wanted_N=expert_N,
                weight_N=weight_N,
                score_TE=score_TE,
                logit_TE=score_TE,
                price_E=price_E,
                valid_T=None,
                length=load.tokens,
                top_k=load.top_k,
                k=load.top_k,
            )
            assignment = AtHome()(choice.load_E.numpy()[None], home)
            dispatch = Dispatch.of(choice, assignment, np.arange(load.experts).tolist(), peers)
            self.experts.compute = compute
            y_TD: Tensor = self.experts(self.x_TD, weight_N, dispatch, self.experts.stack(), Nobody())
            return y_TD

        return run

    def _timed(self, peer: Peer) -> Run:
        def once() -> Tensor:
            with torch.set_grad_enabled(self.backward):
                y_TD = peer.run()
            if self.backward:
                torch.autograd.backward(y_TD, self.dy_TD)
                self.x_TD.grad = self.weight_TK.grad = None
                peer.module.zero_grad(set_to_none=True)
                self.experts.zero_grad(set_to_none=True)
            return y_TD.detach()

        return once

    def floor(self) -> Run:
        return dense(self.make, self.load.rows, self.load.dim, self.load.hidden, self.backward)

    def floor_by_expert(self) -> Run:
        rows_E = self.expert_TK.flatten().bincount(minlength=self.load.experts).tolist()
        return by_expert(self.make, rows_E, self.load.dim, self.load.hidden, self.backward)

    def make(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype)

    def saved_mib(self, run: Callable[[], Tensor]) -> float:
        """What autograd keeps from forward to backward, each storage once, weights and the input left out."""
        kept: dict[int, int] = {}
        given = {tensor.untyped_storage().data_ptr() for tensor in (self.x_TD, *self.experts.parameters())}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y_TD = run()
        del y_TD
        return sum(kept.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=[*WORKLOADS], help="one workload instead of all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"experts: {KERNELS.in_use()}")
    loads = {name: load for name, load in WORKLOADS.items() if arguments.only in (None, name)}
    for backward in (False, True):
        table(loads, arguments.rounds, backward=backward)
    saved(loads)


def suite(names: Sequence[str], seconds: float, count: int, *, kinds: Sequence[str]) -> Iterator[Measured]:
    """Of the named workloads, ours and the peers within so many seconds: for the suite."""
    torch.set_num_threads(1)
    weight = {
        (name, dtype, backward): (2.5 if backward else 1) * CHEAPER[dtype] * (load.flops + 1e10)
        for name, load in WORKLOADS.items()
        for dtype in TYPES
        for backward in [kind == BACKWARD for kind in kinds]
        if name in names
    }
    for (name, dtype, backward), budget in shared(seconds, weight):
        start = time.monotonic()
        bench = Bench(WORKLOADS[name], dtype, backward=backward)
        peers, absent = bench.peers()
        if backward and bench.load.experts > 32 and "HF eager" in peers:
            del peers["HF eager"]
            absent["HF eager"] = "its backward takes many times the floor here; python -m scripts.bench.experts has it"
        samples, failed = measure(bench.candidates() | peers, count, budget - (time.monotonic() - start), CLOSE[dtype])
        what = f"{str(dtype).removeprefix('torch.')}, {BACKWARD if backward else FORWARD}"
        yield Measured.of(samples, workload=name, what=what, clock="CPU", absent=absent | failed)


def table(loads: Mapping[str, Workload], count: int, *, backward: bool) -> None:
    rows: list[list[object]] = []
    gains = []
    for name, load in loads.items():
        for dtype in TYPES:
            bench = Bench(load, dtype, backward=backward)
            found, absent = bench.peers()
            samples, failed = measure(bench.candidates() | bench.variants() | found, count, close=CLOSE[dtype])
            seconds, absent = samples.seconds, absent | failed
            ratio = {who: median_ratio(taken, seconds["floor"][: len(taken)]) for who, taken in seconds.items()}
            cells = [cell(who, ratio, seconds, count) for who in COLUMNS]
            cells.append(f"{band(seconds['again'], seconds['ours']):.2f}")
            if peers := [who for who in seconds if who in MAKERS]:
                best = min(peers, key=lambda who: ratio[who])
                gains.append(median_ratio(seconds[best], seconds["ours"][: len(seconds[best])]))
                cells.append(f"{gains[-1]:.2f}")
            floor = f"{statistics.median(seconds['floor']) * 1e3:.0f}"
            rows.append([name, str(dtype).removeprefix("torch."), floor, *cells])
            print("".join(f"{name}: {who} is left out: {why}\n" for who, why in absent.items()), end="")
    heads = ["workload", "type", "floor, ms", *(f"{who}, × floor" for who in COLUMNS), "noise"]
    heads += ["ours against the best peer: times faster"] if gains else []
    show("Forward + backward" if backward else "Forward", heads, rows)
    if gains:
        print(f"\ngeometric mean against the best peer: {exp(sum(map(log, gains)) / len(gains)):.2f} times faster")


def cell(who: str, ratio: Mapping[str, float], seconds: Mapping[str, Sequence[float]], count: int) -> str:
    if who not in ratio:
        return "-"
    return f"{ratio[who]:.2f}{'' if len(seconds[who]) == count else ' once'}"


def measure(
    candidates: Mapping[str, Run], count: int, budget: float = inf, close: float = CLOSE[torch.bfloat16]
) -> tuple[Samples, dict[str, str]]:
    """CPU seconds of each candidate, round after round, the floor being the first of them; of the slow peers, of one
    run. A peer that fails, or gives something else than ours, is not timed: -> and why not"""
    end, once, absent = time.monotonic() + budget, {}, {}
    y_TD: dict[str, Tensor | None] = {}
    for name, run in candidates.items():
        try:
            start = time.process_time()
            y_TD[name] = run()
            once[name] = time.process_time() - start
        except FAILURES as failure:
            if name not in MAKERS:
                raise
            absent[name] = reason(failure)
            continue
        if name in MAKERS and (error := apart(y_TD[name], y_TD["ours"])) > close:
            absent[name] = f"its result differs from ours by {error:.1e}"
            del once[name]
    y_TD.clear()
    floor = cpu_seconds(candidates["floor"])()
    quick = [name for name in once if once[name] < SLOW * floor or name not in MAKERS]
    repeats = max(1, min(20, int(0.05 / floor)))
    many = {name: cpu_seconds(candidates[name], repeats) for name in quick}
    warm = repeats * sum(once[name] for name in quick)
    samples = interleaved(many, count, budget=end - time.monotonic(), warm=warm)
    return Samples({name: samples.seconds.get(name, [once[name]]) for name in once}, samples.foreign), absent


def apart(theirs: Tensor | None, ours: Tensor | None) -> float:
    """|theirs - ours| / |ours|"""
    assert theirs is not None
    assert ours is not None
    return float((theirs.double() - ours.double()).norm() / ours.double().norm())


def saved(loads: Mapping[str, Workload]) -> None:
    rows: list[list[object]] = []
    for name, load in loads.items():
        for dtype in TYPES:
            bench = Bench(load, dtype, backward=True)
            ours = bench.saved_mib(bench.ours(Fastest()))
            found, _ = peers_of(bench.case())
            peers = [bench.saved_mib(peer.run) for name, peer in found.items() if name == "HF grouped"]
            rows.append([name, str(dtype).removeprefix("torch."), ours, *peers, *(mib / ours for mib in peers)])
    heads = ["HF grouped", "HF grouped ÷ ours"] if len(rows[0]) > 3 else []
    show("Saved for backward, MiB", ["workload", "type", "ours", *heads], rows)


if __name__ == "__main__":
    main()
