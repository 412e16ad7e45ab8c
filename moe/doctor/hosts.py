"""The MoE blocks of a model that the doctor knows: ours, transformers', Megatron-Core's, DeepSpeed's.

Hosts are known by what their modules have, not by their classes, so that none of them needs to be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe.doctor.block import Block, Said, Tell, Weight, chosen, listening
from moe.layer import MoE
from routing import Choice, Router, Unpriced

PRICES = ("e_score_correction_bias", "expert_bias", "correction_bias")
COUNTS = ("local_tokens_per_expert", "tokens_per_expert", "expert_counts")


def find_blocks(model: nn.Module, own: Sequence[Block] = ()) -> list[Block]:
    """own: blocks that somebody described; what lies in them is not looked at again."""
    found, taken = list(own), {inner for block in own for inner in block.module.modules()}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module in taken:
            continue
        block = _block(name or "model", module)
        if block is not None:
            found.append(block)
            taken |= set(module.modules())
    return found


def _block(name: str, module: nn.Module) -> Block | None:
    if isinstance(module, MoE) and module.router.weight is not None:
        return _ours(name, module)
    for child in module.children():
        if _fused(child):
            return _fused_block(name, module, child)
    if callable(getattr(module, "gating", None)) and hasattr(getattr(module, "config", None), "num_moe_experts"):
        return _megatron(name, module)
    if isinstance(getattr(module, "wg", None), nn.Linear) and hasattr(module, "capacity_factor"):
        return _deepspeed(name, module)
    return _loose(name, module)


def _ours(name: str, layer: MoE) -> Block:
    def read(args: Any, out: Any) -> Said | None:
        return None if layer.pool.counting or not isinstance(out, Choice) else said_by(out, args[0])

    return Block(
        host="evenmoe", name=name, module=layer, num_experts=layer.config.num_experts, router=layer.router,
        listen=listening(layer.router, read), **_standing(layer, bool(layer.config.losses)),
    )  # fmt: skip


def said_by(choice: Choice, x_TD: Tensor | None) -> Said:
    table = torch.zeros(choice.num_tokens, choice.num_experts + 1, dtype=torch.bool, device=choice.score_TE.device)
    table[choice.token_N, choice.wanted_N.where(choice.wanted_N >= 0, choice.num_experts)] = True
    return Said(
        logits=choice.logit_TE, chosen_TE=table[:, :-1], score_TE=choice.score_TE, price_E=choice.price_E,
        real_T=choice.valid_T, x_TD=x_TD,
    )  # fmt: skip


def _standing(layer: MoE, feeds: bool) -> dict[str, Any]:
    """What holds of any layer of ours, in a host's block too."""
    router: Router = layer.router
    moves = not isinstance(router.balancer, Unpriced)

    def down() -> tuple[Weight, ...]:
        home_E, ids = layer.placement.home_E, layer.experts.expert_ids
        counted = tuple(slot for slot, expert in enumerate(ids) if home_E[expert] == layer.peers.rank)
        return _down(layer.experts, counted)

    def settled() -> int:
        return int(router.settled)

    return {
        "experts": layer.experts,
        "down": down,
        "held": lambda: int((layer.placement.home_E == layer.peers.rank).sum()),
        "price": lambda: router.price_E,
        "counts": lambda: router.stats["load_E"],
        "settled": settled,
        "moves": moves,
        "feeds": feeds or moves,
        "spread": layer.peers.size > 1,
    }


def _down(experts: nn.Module, counted: tuple[int, ...] | None) -> tuple[Weight, ...]:
    """The last weights of stacked experts, under our names or transformers'."""
    found = []
    names = (("down", 1), ("down_bias", 1), ("down_proj", 2 if _transposed(experts) else 1), ("down_proj_bias", 1))
    for name, axis in names:
        weight = getattr(experts, name, None)
        if isinstance(weight, nn.Parameter):
            found.append(Weight(parameter=weight, axis=axis, counted_A=counted))
    return tuple(found)


def _transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", getattr(experts, "transposed", False)))


def _fused(module: nn.Module) -> bool:
    """Experts as transformers stacks them, or ours in their place."""
    if isinstance(module, MoE):
        return module.router.weight is None
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3 and isinstance(getattr(module, "num_experts", None), int)


def _fused_block(name: str, block: nn.Module, experts: nn.Module) -> Block:
    """The experts are called with the choice, and one of their sisters returned the logits before."""
    ours = experts if isinstance(experts, MoE) else None
    num_experts: int = ours.config.num_experts if ours is not None else experts.num_experts  # type: ignore[assignment]
    routers = [child for child in block.children() if child is not experts]
    router = next((child for child in routers if _scores(child, num_experts)), None)

    def listen(tell: Tell) -> list[Callable[[], None]]:
        last: dict[str, Tensor] = {}

        def score(module: nn.Module, args: Any, out: Any) -> None:
            logits = [part for part in (out if isinstance(out, tuple) else (out,)) if _is_table(part, num_experts)]
            if logits and module is router:
                last.update(logit=logits[0], x=args[0].reshape(-1, args[0].shape[-1]))

        def choose(module: nn.Module, args: Any) -> None:
            logit_TE, x_TD = last.pop("logit", None), last.pop("x", None)
            tell(Said(logits=logit_TE, x_TD=x_TD, chosen_TE=chosen(args[1], num_experts), **priced(logit_TE)))

        hooks = [child.register_forward_hook(score) for child in routers]
        return [hook.remove for hook in (*hooks, experts.register_forward_pre_hook(choose))]

    bias = _find(block, PRICES, num_experts)

    def priced(logit_TE: Tensor | None) -> dict[str, Tensor]:
        if logit_TE is None or ours is not None or (bias_E := bias()) is None:
            return {}
        return {"score_TE": logit_TE.detach().float().sigmoid(), "price_E": -bias_E.detach().float()}

    facts: dict[str, Any] = {"experts": experts, "down": lambda: _down(experts, None), "price": bias}
    facts |= {"counts": _find(block, COUNTS, num_experts), "held": lambda: num_experts}
    if ours is not None:
        facts = _standing(ours, False)
    top_k = getattr(router, "top_k", getattr(block, "top_k", None))
    return Block(
        host="transformers", name=name, module=block, num_experts=num_experts, router=router, listen=listen,
        top_k=top_k if isinstance(top_k, int) else None, **facts,
    )  # fmt: skip


def _megatron(name: str, router: nn.Module) -> Block:
    config: Any = router.config
    num_experts = int(config.num_moe_experts)

    def listen(tell: Tell) -> list[Callable[[], None]]:
        last: dict[str, Tensor] = {}
        gating: Any = router.gating

        def overheard(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits: Tensor = gating(x, *args, **kwargs)
            last.update(logit=logits, x=x.reshape(-1, x.shape[-1]))
            return logits

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, tuple) and len(out) == 2 and out[1].dtype == torch.bool:
                tell(Said(logits=last.pop("logit", None), chosen_TE=out[1], x_TD=last.pop("x", None)))

        router.__dict__["gating"] = overheard
        return [router.register_forward_hook(hook).remove, lambda: router.__dict__.pop("gating", None)]

    bias, counts = _find(router, PRICES, num_experts), _find(router, COUNTS, num_experts)
    enabled = bool(getattr(config, "moe_router_enable_expert_bias", False))
    return Block(
        host="megatron", name=name, module=router, num_experts=num_experts, listen=listen, price=bias, counts=counts,
        top_k=config.moe_router_topk, moves=enabled, feeds=enabled, sequence_first=True,
    )  # fmt: skip


def _deepspeed(name: str, gate: nn.Module) -> Block:
    num_experts = int(gate.wg.out_features)  # type: ignore[union-attr,arg-type]

    def read(args: Any, out: Any) -> Said | None:
        dense = isinstance(out, tuple) and len(out) == 4 and isinstance(out[2], Tensor) and out[2].ndim == 3
        return Said(chosen_TE=out[2].any(dim=-1), aux=out[0]) if dense else None

    return Block(
        host="deepspeed", name=name, module=gate, num_experts=num_experts, listen=listening(gate, read), feeds=True
    )


def _loose(name: str, block: nn.Module) -> Block | None:
    """A linear gate beside a list of so many experts: all that is known of it is its logits."""
    for gate in block.children():
        for experts in block.children():
            if isinstance(gate, nn.Linear) and isinstance(experts, nn.ModuleList) and len(experts) > 1:
                if gate.out_features != len(experts):
                    continue
                return Block(
                    host="other", name=name, module=block, num_experts=len(experts), router=gate,
                    listen=listening(gate, lambda args, out: Said(logits=out,
                                                                  x_TD=args[0].reshape(-1, args[0].shape[-1]))),
                    price=_find(block, PRICES, len(experts)), counts=_find(block, COUNTS, len(experts)),
                )  # fmt: skip
    return None


def _find(module: nn.Module, names: Sequence[str], num_experts: int) -> Callable[[], Tensor | None]:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for inner in module.modules():
            yield from inner._buffers.items()  # type: ignore[misc]
            yield from inner._parameters.items()  # type: ignore[misc]

    def find() -> Tensor | None:
        for name, tensor in tensors():
            if name in names and tensor is not None and tensor.numel() == num_experts:
                return tensor.reshape(-1)
        return None

    return find


def _scores(module: nn.Module, num_experts: int) -> bool:
    """Has it a weight with a line for each expert?"""
    return any(p.ndim == 2 and p.shape[0] == num_experts for p in module.parameters())


def _is_table(part: Any, num_experts: int) -> bool:
    return isinstance(part, Tensor) and part.ndim == 2 and part.shape[1] == num_experts and part.is_floating_point()
