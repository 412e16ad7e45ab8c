"""Claim: what a layer of few tokens takes: besides its matmuls, where experts are narrow, and in all, as published.

    python -m scripts.bench.few [--rounds 9]

Narrow: 16 experts, top-2, dim 64, hidden 64, fp32. Published: Qwen3-30B-A3B's, 128 experts, top-8, dim 2048, hidden
768, fp32, 2.4 GB. One process, one thread, forward without gradients, router included; CPU time of one call, the mean
of some in a row. The peers are transformers' Qwen3 block, its experts in a loop ("eager") and grouped, with the same
weights; each must give what ours gives before it is timed. "again" is ours a second time: the noise. Two ranks: the
narrow layer on two gloo processes, by the wall's clock, half of the tokens each.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from moe import MoE, MoEConfig, World
from moe.comm import world_group
from routing import AtHome, LeastLoaded, Weigh
from scripts.bench.peers import FAILURES
from scripts.bench.table import against, band, cpu_seconds, finish, median_ratio, parser, rounds, show

CONFIG = MoEConfig(dim=64, hidden=64, num_experts=16, top_k=2, weigh=Weigh(normalize=True), assigner=AtHome())
PUBLISHED = replace(CONFIG, dim=2048, hidden=768, num_experts=128, top_k=8)
TOKENS = (1, 4, 16, 64, 256)
CALLS = 100


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=9)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    heads = ["tokens", "ours, µs", "noise", "HF eager", "HF grouped"]
    show("Few tokens, one process", heads, alone(CONFIG, CALLS, given.rounds))
    show("Few tokens, Qwen3-30B-A3B's experts", heads, alone(PUBLISHED, 3, given.rounds))
    with World(2, timeout=timedelta(minutes=5)) as world:
        rows = world.run(together, given.rounds)[0]
    show("Few tokens, two ranks", ["tokens", "at home, µs", "an all-gather and two all-to-alls", "least-loaded"], rows)
    finish(given)


@torch.no_grad()
def alone(config: MoEConfig, calls: int, count: int) -> list[list[object]]:
    layer, rows = MoE(config).eval(), []
    peers = {f"HF {way}": hugging_face(layer, way) for way in ("eager", "grouped_mm")}
    for tokens in TOKENS:
        x_TD = torch.randn(tokens, config.dim)
        runs: dict[str, Callable[[], object]] = {"ours": lambda x=x_TD: layer(x), "again": lambda x=x_TD: layer(x)}  # type: ignore[misc]
        for name, peer in peers.items():
            if peer is not None:
                torch.testing.assert_close(peer(x_TD), layer(x_TD), rtol=1e-4, atol=1e-5)
                runs[name] = lambda x=x_TD, peer=peer: peer(x)  # type: ignore[misc]
        seconds = rounds({name: cpu_seconds(run, calls) for name, run in runs.items()}, count)
        noise = band(seconds["again"], seconds["ours"])
        cells = [against(median_ratio(seconds[p], seconds["ours"]), noise) if p in seconds else "-" for p in peers]
        rows.append([tokens, f"{statistics.median(seconds['ours']) * 1e6:.0f}", noise, *cells])
    return rows


def hugging_face(layer: MoE, implementation: str) -> Callable[[Tensor], Tensor] | None:
    """transformers' block with the layer's weights. None where it is not installed."""
    try:
        modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        config = importlib.import_module("transformers").Qwen3MoeConfig(
            hidden_size=layer.config.dim,
            moe_intermediate_size=layer.config.hidden,
            num_experts=layer.config.num_experts,
            num_experts_per_tok=layer.config.top_k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):  # no weights of its own
            block = modeling.Qwen3MoeSparseMoeBlock(config).eval()
        block.gate.weight, block.experts.gate_up_proj = layer.router.weight, layer.experts.up
        block.experts.down_proj = layer.experts.down
    except FAILURES:
        return None

    def run(x_TD: Tensor) -> Tensor:
        given = block(x_TD[None])
        y_BTD: Tensor = given[0] if isinstance(given, tuple) else given
        return y_BTD.view(x_TD.shape)

    return run


@torch.no_grad()
def together(count: int) -> list[list[object]]:
    """Beside the layer, its three collectives alone, with as many bytes."""
    torch.manual_seed(0)
    group, rows = world_group(), []
    layers = {
        "at home": MoE(CONFIG, group).eval(),
        "least-loaded": MoE(replace(CONFIG, assigner=LeastLoaded()), group).eval(),
    }
    for tokens in TOKENS[1:]:
        x_TD = torch.randn(tokens // 2, CONFIG.dim)
        count_E, row_ND = torch.zeros(CONFIG.num_experts + 5, dtype=torch.int64), torch.randn(tokens, CONFIG.dim)
        arrived = [torch.empty_like(count_E) for _ in range(2)]

        def collectives(count_E: Tensor = count_E, row_ND: Tensor = row_ND, arrived: list[Tensor] = arrived) -> None:
            dist.all_gather(arrived, count_E)
            for _ in range(2):
                dist.all_to_all_single(torch.empty_like(row_ND), row_ND)

        runs: dict[str, Callable[[], object]] = {
            name: lambda x=x_TD, layer=layer: layer(x)  # type: ignore[misc]
            for name, layer in layers.items()
        }
        seconds = rounds({name: wall(run) for name, run in (runs | {"collectives": collectives}).items()}, count)
        base = seconds["at home"]
        ratios = [median_ratio(seconds[name], base) for name in ("collectives", "least-loaded")]
        rows.append([tokens, f"{statistics.median(base) * 1e6:.0f}", *ratios])
    return rows


def wall(run: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        return (time.perf_counter() - start) / CALLS

    return once


if __name__ == "__main__":
    main()
