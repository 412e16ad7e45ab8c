"""Claim: with hot experts, a least-loaded layer is faster than one at home and keeps less on the busiest rank.

    python -m scripts.bench.layer [--tokens 2048] [--rounds 5]

Two gloo processes of one thread each, a layer of 16 experts, top-4, dim 512, hidden 1024. A share of the tokens chooses
4 hot experts, all distinct and all at home on rank 0, the rest chooses at random. The ceiling is at-home's peak/mean:
what perfect balance at no cost would gain. CPU: the CPU seconds of the busiest rank, which other work on the machine
disturbs less than the wall time. "again" is the at-home layer a second time: the noise of this run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from moe import MoE, MoEConfig, World
from moe.comm import world_group
from placement import Placement
from routing import Assigner, Assignment, AtHome, LeastLoaded, Rows, Tokens, TopK
from routing.select import token_major
from scripts.bench.table import median_ratio, rounds, show

CONFIG = MoEConfig(dim=512, hidden=1024, num_experts=16, top_k=4)
HOT = 4
CANDIDATES: dict[str, Assigner] = {
    "at home": AtHome(),
    "again": AtHome(),
    "least-loaded": LeastLoaded(headroom=1.0, min_chunk=64),
}


@dataclass(frozen=True, kw_only=True)
class HotSet(TopK):
    """A share of the tokens takes the HOT first experts, each once; the others any top_k, all alike likely."""

    share: float = 0.0

    def __call__(self, priced_TE: Tensor, top_k: int, tokens: Tokens) -> Rows:
        num_tokens, num_experts = priced_TE.shape
        generator = torch.Generator().manual_seed(dist.get_rank())
        expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=-1).indices
        expert_TK[: int(num_tokens * self.share)] = torch.arange(HOT)
        return token_major(expert_TK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    with World(2, timeout=timedelta(minutes=10)) as world:
        for dtype in (torch.float32, torch.bfloat16):
            for share in (0.0, 0.5, 0.8, 0.95):
                seen = world.run(measure, share, dtype, arguments.tokens, arguments.rounds)[0]
                name = "balanced" if share == 0 else f"{share:.0%} into {HOT}"
                rows.append([str(dtype).removeprefix("torch."), name, *seen])
    heads = ["type", "workload", "peak/mean (ceiling)", "visits"]
    for what in ("forward", "forward + backward"):
        heads += [f"{what}, wall: speed-up", "(again)", f"{what}, CPU: speed-up", "(again)"]
    heads.append("saved bytes, busiest rank: × at home")
    show(f"Least-loaded against at home, 2 processes, {arguments.tokens} tokens a rank", heads, rows)


def measure(share: float, dtype: torch.dtype, num_tokens: int, count: int) -> list[object]:
    layers = {name: build(assigner, share, dtype) for name, assigner in CANDIDATES.items()}
    x = torch.randn(num_tokens, CONFIG.dim, dtype=dtype)
    plans: list[Assignment] = []
    handles = [layer.observe(lambda choice, assignment: plans.append(assignment)) for layer in layers.values()]
    for layer in layers.values():
        layer(x)
    for handle in handles:
        handle.remove()
    home_R = plans[0].load_R
    visits = len(plans[-1].loans(layers["least-loaded"].placement))
    answer: list[object] = [float(home_R.max() / home_R.mean()), visits]
    for backward in (False, True):
        cpu: dict[str, list[float]] = {name: [] for name in layers}
        wall = rounds({name: timed(layer, x, backward, cpu[name]) for name, layer in layers.items()}, count)
        for seconds in (wall, {name: samples[1:] for name, samples in cpu.items()}):
            answer += [1 / median_ratio(seconds[name], seconds["at home"]) for name in ("least-loaded", "again")]
    saved = {name: busiest(saved_bytes(layer, x)) for name, layer in layers.items()}
    return [*answer, saved["least-loaded"] / saved["at home"]]


def build(assigner: Assigner, share: float, dtype: torch.dtype) -> MoE:
    """The hot experts, 0 to 3, share rank 0."""
    torch.manual_seed(0)
    placement = Placement(expert_RS=torch.arange(CONFIG.num_experts).view(2, -1).numpy())
    return MoE(replace(CONFIG, assigner=assigner, select=HotSet(share=share)), world_group(), placement, dtype=dtype)


def timed(layer: MoE, x: Tensor, backward: bool, cpu: list[float]) -> Callable[[], float]:
    """The seconds from when all ranks begin to when the last has ended; the busiest rank's CPU seconds go to cpu."""

    def once() -> float:
        layer.zero_grad(set_to_none=True)
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(backward):
            y = layer(x.requires_grad_(backward))
        if backward:
            y.backward(torch.ones_like(y))
        wall, own_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        cpu.append(busiest(own_cpu))
        return busiest(wall)

    return once


def saved_bytes(layer: MoE, x: Tensor) -> float:
    """What autograd keeps from forward to backward, each storage once, parameters left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.requires_grad_())
    del y
    return float(sum(kept.values()))


def busiest(value: float) -> float:
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


if __name__ == "__main__":
    main()
