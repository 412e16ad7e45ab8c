"""Claim: from a choice to the summed results, our experts are close to a dense chain of matmuls and beat their peers.

    python -m scripts.bench.experts [--rounds 5] [--only wide-64x8] [--crossover]

One thread, CPU seconds of the process, so other work on the machine matters little. The floor is two matmuls of all
rows together (six with backward) into memory that is there already: the same FLOPs, no routing, no activation. Every
candidate starts from the chosen experts and their weights, sorts, computes and adds up. The peers are transformers'
Qwen3 experts, in a loop ("eager") and grouped; without transformers they are left out. A candidate that takes more than
five times the floor is run once, marked "once", and does not hold up the others. "again" is ours a second time: a
difference within |again/ours - 1| is noise. "torch" is ours without the compiled path, whether or not it is built.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
import torch
from torch import Tensor

from moe import Experts, Fastest, Grouped, Loop
from moe.blocks import KERNELS
from moe.comm import Peers
from moe.compute import Compute
from moe.dispatch import Dispatch
from moe.guests import Nobody
from placement import RoundRobin, Topology
from routing import AtHome, Choice
from scripts.bench.dense import dense
from scripts.bench.table import in_python, median_ratio, rounds, show

Run = Callable[[], None]
TYPES = (torch.float32, torch.bfloat16)
SLOW = 5.0
COLUMNS = ("ours", "again", "torch", "grouped", "HF eager", "HF grouped")


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
        runs: dict[str, Run] = {"ours": self.run(Fastest()), "again": self.run(Fastest())}
        runs |= {"torch": in_python(self.run(Fastest())), "grouped": in_python(self.run(Grouped()))}
        return {"floor": self.floor(), **runs, **{name: self._timed(peer) for name, peer in self.peers().items()}}

    def run(self, compute: Compute) -> Run:
        return self._timed(self.ours(compute))

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

    def peers(self) -> dict[str, Callable[[], Tensor]]:
        if importlib.util.find_spec("transformers") is None:
            return {}
        return {
            f"HF {name}": self._hugging_face(impl) for name, impl in (("eager", "eager"), ("grouped", "grouped_mm"))
        }

    def _hugging_face(self, implementation: str) -> Callable[[], Tensor]:
        load, qwen = self.load, "transformers.models.qwen3_moe."
        config = importlib.import_module(f"{qwen}configuration_qwen3_moe").Qwen3MoeConfig(
            num_experts=load.experts,
            hidden_size=load.dim,
            moe_intermediate_size=load.hidden,
            num_experts_per_tok=load.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = importlib.import_module(f"{qwen}modeling_qwen3_moe").Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = self.experts.up, self.experts.down

        def run() -> Tensor:
            y_TD: Tensor = module(self.x_TD, self.expert_TK, self.weight_TK.to(self.dtype))
            return y_TD

        return run

    def _timed(self, run: Callable[[], Tensor]) -> Run:
        def once() -> None:
            self.experts.zero_grad(set_to_none=True)
            self.x_TD.grad = self.weight_TK.grad = None
            with torch.set_grad_enabled(self.backward):
                y_TD = run()
            if self.backward:
                torch.autograd.backward(y_TD, self.dy_TD)

        return once

    def floor(self) -> Run:
        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=self.dtype)

        return dense(make, self.load.rows, self.load.dim, self.load.hidden, self.backward)

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
    parser.add_argument("--crossover", action="store_true", help="Grouped against Loop at few rows an expert, no more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.crossover:
        crossover(arguments.rounds)
        return
    print(f"experts: {KERNELS.in_use()}")
    loads = {name: load for name, load in WORKLOADS.items() if arguments.only in (None, name)}
    for backward in (False, True):
        table(loads, arguments.rounds, backward=backward)
    saved(loads)


def table(loads: Mapping[str, Workload], count: int, *, backward: bool) -> None:
    rows: list[list[object]] = []
    gains = []
    for name, load in loads.items():
        for dtype in TYPES:
            seconds = measure(Bench(load, dtype, backward=backward).candidates(), count)
            ratio = {who: median_ratio(taken, seconds["floor"][: len(taken)]) for who, taken in seconds.items()}
            cells = [cell(who, ratio, seconds, count) for who in COLUMNS]
            cells.append(f"{abs(median_ratio(seconds['again'], seconds['ours']) - 1):.2f}")
            peers = [who for who in seconds if who.startswith("HF")]
            if peers:
                best = min(peers, key=lambda who: ratio[who])
                gains.append(median_ratio(seconds[best], seconds["ours"][: len(seconds[best])]))
                cells.append(f"{gains[-1]:.2f}")
            floor = f"{statistics.median(seconds['floor']) * 1e3:.0f}"
            rows.append([name, str(dtype).removeprefix("torch."), floor, *cells])
    heads = ["workload", "type", "floor, ms", *(f"{who}, × floor" for who in COLUMNS), "noise"]
    heads += ["ours against the best peer: times faster"] if gains else []
    show("Forward + backward" if backward else "Forward", heads, rows)
    if gains:
        print(f"\ngeometric mean against the best peer: {exp(sum(map(log, gains)) / len(gains)):.2f} times faster")


def cell(who: str, ratio: Mapping[str, float], seconds: Mapping[str, Sequence[float]], count: int) -> str:
    if who not in ratio:
        return "-"
    return f"{ratio[who]:.2f}{'' if len(seconds[who]) == count else ' once'}"


def measure(candidates: Mapping[str, Run], count: int) -> dict[str, list[float]]:
    """CPU seconds of each candidate, round after round; of the slow ones, of one run."""
    timed = {name: cpu_seconds(run) for name, run in candidates.items()}
    timed["floor"]()
    floor = timed["floor"]()
    once = {name: run() for name, run in timed.items()}
    quick = {name: run for name, run in timed.items() if once[name] < SLOW * floor or not name.startswith("HF")}
    repeats = max(1, min(20, int(0.05 / floor)))
    many = {name: cpu_seconds(run, repeats) for name, run in candidates.items() if name in quick}
    seconds = rounds(many, count)
    return {name: seconds.get(name, [once[name]]) for name in candidates}


def cpu_seconds(run: Run, repeats: int = 1) -> Callable[[], float]:
    def once() -> float:
        start = time.process_time()
        for _ in range(repeats):
            run()
        return (time.process_time() - start) / repeats

    return once


def saved(loads: Mapping[str, Workload]) -> None:
    rows: list[list[object]] = []
    for name, load in loads.items():
        for dtype in TYPES:
            bench = Bench(load, dtype, backward=True)
            ours = bench.saved_mib(bench.ours(Fastest()))
            peers = [bench.saved_mib(run) for name, run in bench.peers().items() if name == "HF grouped"]
            rows.append([name, str(dtype).removeprefix("torch."), ours, *peers, *(mib / ours for mib in peers)])
    heads = ["HF grouped", "HF grouped ÷ ours"] if len(rows[0]) > 3 else []
    show("Saved for backward, MiB", ["workload", "type", "ours", *heads], rows)


def crossover(count: int) -> None:
    rows: list[list[object]] = []
    for num_experts, dim, hidden in ((64, 512, 1024), (128, 1024, 512)):
        for dtype in TYPES:
            for per_expert in (1, 8, 32, 128, 256):
                load = Workload(
                    tokens=num_experts * per_expert // 8, dim=dim, hidden=hidden, experts=num_experts, top_k=8
                )
                ratios = []
                for backward in (False, True):
                    bench = Bench(load, dtype, backward=backward)
                    runs = {
                        "loop": in_python(bench.run(Loop())),
                        "grouped": in_python(bench.run(Grouped())),
                        "floor": bench.floor(),
                    }
                    seconds = measure(runs, count)
                    ratios.append(median_ratio(seconds["grouped"], seconds["loop"]))
                rows.append([num_experts, dim, hidden, str(dtype).removeprefix("torch."), per_expert, *ratios])
    heads = ["experts", "dim", "hidden", "type", "rows an expert", "forward", "forward + backward"]
    show("Grouped ÷ Loop, CPU time (below 1: Grouped is faster)", heads, rows)


if __name__ == "__main__":
    main()
