"""A host's router, overheard: it stays as it is, and what it asks of torch.topk is heard and, if need be, answered.

Every router of the fused-experts families but one chooses by a top-k over a table of scores, one line a token, one
column an expert. While the block runs, that call passes through here. Without a balancer it is answered as torch would;
in a recomputation, with the choice made before; with prices, by score less price. The host then goes on to weigh with
its own scores, so weights and their gradients belong to the choice that is used, whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe.integrations.told import ToldRouter
from routing import Balancer, Choice, Rows


class HostRouter(ToldRouter):
    """A ToldRouter that hears by itself. hear, and go deaf: hooks of the block whose router it listens to."""

    def __init__(self, num_experts: int, top_k: int, *, balancer: Balancer, device: torch.device) -> None:
        super().__init__(num_experts, top_k, balancer=balancer, device=device)
        self.valid_T: Tensor | None = None  # see leave_padding_out
        self._ears: list[_Ear] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def answer(self, topk: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a call of torch.topk. -> what it would return"""
        score_TE, k = _asked(*args, **kwargs)
        if score_TE.ndim != 2 or score_TE.shape[1] != len(self.price_E) or k != self.top_k:
            return topk(*args, **kwargs)
        expert_TK = self.ask(score_TE, lambda _: topk(*args, **kwargs).indices, self.valid_T)
        expert_TK = expert_TK.clamp(min=0)  # a recomputation repeats nowhere too, for which the host has no word
        # Always a gather, as a recomputation must save what the first forward saved.
        return torch.return_types.topk((score_TE.gather(1, expert_TK), expert_TK))

    def told(self, expert_TK: Tensor, weight_TK: Tensor, rows: Rows | None, valid_T: Tensor | None = None) -> Choice:
        """Without what the attention mask leaves out, if it is known."""
        valid_T = self.valid_T if valid_T is None else valid_T
        if valid_T is not None and len(valid_T) != len(expert_TK):
            raise ValueError(
                f"the attention mask tells of {len(valid_T)} tokens, this block was given {len(expert_TK)}; "
                f"call remove() on what leave_padding_out returned"
            )
        if valid_T is not None:  # a number beyond the last expert is nowhere
            expert_TK = expert_TK.where(valid_T[:, None], len(self.price_E))
        return super().told(expert_TK, weight_TK, rows, valid_T)

    def hear(self, block: nn.Module, args: Any) -> None:
        self.heard = None
        ear = _Ear(self)
        ear.__enter__()  # type: ignore[no-untyped-call]
        self._ears.append(ear)

    def go_deaf(self, block: nn.Module, args: Any, out: Any) -> None:
        if self._ears:
            self._ears.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Ear(TorchFunctionMode):
    """Hears every call of torch.topk in its thread, by the function or the method."""

    def __init__(self, router: HostRouter) -> None:
        super().__init__()
        self.router = router

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.topk or func is torch.Tensor.topk:
            return self.router.answer(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _asked(input: Tensor, k: int, *rest: Any, **options: Any) -> tuple[Tensor, int]:
    return input, k
