"""Claim: balancing costs little of a layer's forward, and several times less than the same rule by sorting.

    python -m scripts.bench.router [--tokens 8192] [--experts 64] [--top-k 8] [--rounds 5]
    python -m scripts.bench.router --quotes

One layer of dim 1024 and hidden 512, one thread, CPU seconds of the process, so other work on the machine matters
little. Router: gate, scores, prices, choice and statistics of one forward in training, without autograd, over the
forward of the whole layer. Balancing: what of it a router without prices does not spend. Quote: the prices alone; in
torch: without the compiled path, built or not; by sorting: from full sorts, as the definition has them. "Again" is the
router without prices a second time: the noise of this run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moe import MoE, MoEConfig
from routing import DECIDERS, Balancer, Router, Unpriced
from routing.bip import Bip
from routing.cutoff import Cutoff
from routing.loss_free import LossFree
from routing.quantile import EdgeQuantile, Quantile
from routing.sinkhorn import Sinkhorn
from scripts.bench.measured import Measured, shared
from scripts.bench.table import cpu_seconds, in_python, interleaved, median_ratio, rounds, show

BALANCERS: dict[str, Balancer] = {
    "no prices": Unpriced(),
    "again": Unpriced(),
    "LossFree": LossFree(),
    "Bip, 2 rounds": Bip(rounds=2),
    "Bip, 4 rounds": Bip(rounds=4),
    "EdgeQuantile, 1 round": EdgeQuantile(rounds=1),
    "Quantile, next step": Quantile(rounds=0),
    "Quantile, 1 round": Quantile(rounds=1),
    "Quantile, 4 rounds": Quantile(rounds=4),
    "Quantile, 1 round, polish 12": Quantile(rounds=1, polish=12),
    "Sinkhorn, 8 rounds": Sinkhorn(rounds=8),
    "Cutoff": Cutoff(),
}

BATCHES = {"bip-8k64": (8192, 64), "bip-32k128": (32768, 128), "bip-64k256": (65536, 256)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quotes", action="store_true", help="prices alone, of ever larger batches, no more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"balancers: {DECIDERS.in_use()}")
    if arguments.quotes:
        quotes(arguments.rounds)
        return
    config = MoEConfig(dim=1024, hidden=512, num_experts=arguments.experts, top_k=arguments.top_k)
    for dtype in (torch.float32, torch.bfloat16):
        measure(config, arguments.tokens, arguments.rounds, dtype)


@torch.no_grad()
def measure(config: MoEConfig, num_tokens: int, count: int, dtype: torch.dtype) -> None:
    x_TD = torch.randn(num_tokens, config.dim, dtype=dtype)
    layer = MoE(config, dtype=dtype)
    routers = {name: built(config, balancer, dtype) for name, balancer in BALANCERS.items()}
    score_TE = routers["no prices"](x_TD).score_TE
    top_k = routers["no prices"].top_k
    candidates = {
        "layer": cpu_seconds(lambda: layer(x_TD)),
        "softmax, top-k": cpu_seconds(lambda: softmax_top_k(score_TE, top_k)),
    }
    for name, router in routers.items():
        candidates[name] = cpu_seconds(partial(route, router, x_TD))
    for name, balancer in BALANCERS.items():
        if isinstance(balancer, Bip) or (isinstance(balancer, Quantile) and balancer.rounds and not balancer.polish):
            candidates[f"{name}: quote"] = cpu_seconds(quote(balancer, score_TE, top_k))
            candidates[f"{name}: in torch"] = cpu_seconds(in_python(quote(balancer, score_TE, top_k)))
            candidates[f"{name}: sorted"] = cpu_seconds(sorted_quote(balancer, score_TE, top_k))
    seconds = rounds(candidates, count)
    rows = []
    for name in BALANCERS:
        spent = [mine - none for mine, none in zip(seconds[name], seconds["no prices"])]
        rows.append(
            [
                name,
                f"{median_ratio(seconds[name], seconds['layer']):.1%}",
                f"{median_ratio(spent, seconds['layer']):.1%}",
                median_ratio(seconds[name], seconds["softmax, top-k"]),
                *(
                    median_ratio(seconds[f"{name}: {over}"], seconds[under.format(name)])
                    if f"{name}: {over}" in seconds
                    else ""
                    for over, under in (("quote", "softmax, top-k"), ("in torch", "{}: quote"), ("sorted", "{}: quote"))
                ),
            ]
        )
    heads = ["balancer", "router ÷ layer", "balancing ÷ layer", "router ÷ (softmax, top-k)", "quote ÷ (softmax, top-k)"]
    heads += ["in torch ÷ quote", "by sorting ÷ quote"]
    title = (
        f"{num_tokens} tokens, {config.num_experts} experts, top-{config.top_k}, {str(dtype).removeprefix('torch.')}"
    )
    show(f"Router and balancer, forward, {title}", heads, rows)


def quotes(count: int) -> None:
    rows: list[list[object]] = []
    for name in BATCHES:
        score_TE = scores_of(name)
        candidates = {"softmax, top-k": cpu_seconds(partial(softmax_top_k, score_TE, 8))}
        for who in ("Bip, 4 rounds", "Quantile, 1 round"):
            candidates[who] = cpu_seconds(quote(BALANCERS[who], score_TE, 8))
            candidates[f"{who}, in torch"] = cpu_seconds(in_python(quote(BALANCERS[who], score_TE, 8)))
        seconds = rounds(candidates, count)
        rows.append([name, *(median_ratio(taken, seconds["softmax, top-k"]) for taken in seconds.values())])
    show("Prices of a batch ÷ (softmax, top-k)", ["batch", *candidates], rows)


def suite(names: Sequence[str], seconds: float, count: int, *, kinds: Sequence[str]) -> Iterator[Measured]:
    """Bip's prices in four rounds, of the named batches, within so many seconds: for the suite. The floor is a softmax
    and a top-k of the same scores; the peers are the same rule in torch, and by sorting where that takes no minute."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wanted = {name: tokens * experts + 2.0**21 for name, (tokens, experts) in BATCHES.items() if name in names}
    for name, budget in shared(seconds, wanted):
        start, score_TE, bip = time.monotonic(), scores_of(name), Bip(rounds=4)
        ours, by_sorting, absent = quote(bip, score_TE, 8), sorted_quote(bip, score_TE, 8), {}
        runs: dict[str, Callable[[], Tensor]] = {"ours": ours, "again": ours, "in torch": in_python(ours)}
        if score_TE.numel() <= 2**22:
            runs["by sorting"] = by_sorting
        else:
            absent["by sorting"] = "takes some ten seconds a run with so many scores"
        for who, run in runs.items():
            assert torch.allclose(run(), ours(), atol=1e-6), f"{name}: {who} quotes other prices"
        candidates = {"floor": cpu_seconds(partial(softmax_top_k, score_TE, 8))}
        candidates |= {who: cpu_seconds(run) for who, run in runs.items()}
        samples = interleaved(candidates, count, budget=budget - (time.monotonic() - start))
        yield Measured.of(samples, workload=name, what="float32, Bip, 4 rounds", clock="CPU", absent=absent)


def scores_of(batch: str) -> Tensor:
    """Popular experts: logits fall by 2 from the first to the last."""
    num_tokens, num_experts = BATCHES[batch]
    return (torch.randn(num_tokens, num_experts) + torch.linspace(1, -1, num_experts)).softmax(dim=1)


def built(config: MoEConfig, balancer: Balancer, dtype: torch.dtype) -> Router:
    """The same router for all, but for its prices: some experts are popular."""
    router = MoE(replace(config, balancer=balancer), dtype=dtype).router
    generator = torch.Generator().manual_seed(0)
    router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * config.dim**-0.5)
    router.price_E.copy_(torch.randn(config.num_experts, generator=generator) * 0.01)
    return router


def route(router: Router, x_TD: Tensor) -> None:
    router.observe(router(x_TD))


def softmax_top_k(score_TE: Tensor, top_k: int) -> Tensor:
    """What any router does: the scores again as logits, which costs the same."""
    return score_TE.softmax(dim=1).topk(top_k, dim=1).values


def quote(balancer: Balancer, score_TE: Tensor, top_k: int) -> Callable[[], Tensor]:
    price_E, settled = torch.zeros(score_TE.shape[1]), torch.ones((), dtype=torch.int64)
    return lambda: balancer.quote(score_TE, price_E, top_k, valid_T=None, settled=settled)


def sorted_quote(balancer: Bip | Quantile, score_TE: Tensor, top_k: int) -> Callable[[], Tensor]:
    """The rule by full sorts."""
    capacity = len(score_TE) * top_k // score_TE.shape[1]

    def pick(sorted_: Tensor, rank: int) -> Tensor:
        if isinstance(balancer, Bip):
            return sorted_.select(-1, rank).clamp(min=0)
        if isinstance(balancer, EdgeQuantile):
            return sorted_.select(-1, rank)
        return (sorted_.select(-1, rank) + sorted_.select(-1, rank - 1)) / 2

    def once() -> Tensor:
        price_E = torch.zeros(score_TE.shape[1])
        for _ in range(balancer.rounds):
            token_price_T = pick((score_TE - price_E).sort(dim=1, descending=True).values, top_k)
            price_E = pick((score_TE - token_price_T[:, None]).T.sort(dim=1, descending=True).values, capacity)
        return price_E

    return once


if __name__ == "__main__":
    main()
