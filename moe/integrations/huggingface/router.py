"""A host's router, overheard: it stays as it is, and what it asks of torch.topk is heard and, if need be, answered.

Every router of the fused-experts families but one chooses by a top-k over a table of scores, one line a token, one
column an expert. While the block runs, that call passes through here. Without a balancer it is answered as torch would;
in a recomputation, with the choice made before; with prices, by score less price. The host then goes on to weigh with
its own scores, so weights and their gradients belong to the choice that is used, whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe.recompute import Replays
from routing import NOWHERE, Balancer, Choice, Router, Rows, Tokens, Unpriced, at_least_fp32, token_major


class HostRouter(Router):
    """scores_TE -> Choice, for the top-k of a host. It has prices and statistics, but no weights: the host has those.

    hear, and go deaf: hooks of the block whose router it listens to.
    """

    def __init__(self, num_experts: int, top_k: int, *, balancer: Balancer, device: torch.device) -> None:
        super().__init__(1, num_experts, top_k, balancer=balancer, device="meta")
        self.weight = None  # type: ignore[assignment]
        self.to_empty(device=device)
        self.reset_parameters()
        self.heard: Choice | None = None
        self.valid_T: Tensor | None = None  # see leave_padding_out
        self._answer: Rows | None = None
        self._ears: list[_Ear] = []
        self._replays: Replays[Rows] = Replays()

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            if not buffer.is_meta:
                nn.init.zeros_(buffer)

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        rows: Rows | None = None,
        *,
        length: int | None = None,
        ratio_B: Tensor | None = None,
    ) -> Choice:
        """x_TD: the scores that the host chooses by, -inf for experts it rules out. Weights are the scores themselves,
        until the host has told its own."""
        score_TE = x_TD.detach().to(at_least_fp32(x_TD.dtype))
        price_E = self.price_E
        if rows is None:
            rows, price_E = self.choose(score_TE, Tokens(valid_T, len(x_TD) if length is None else length), None)
        return Choice(
            token_N=rows.token_N,
            expert_N=rows.expert_N,
            wanted_N=rows.expert_N,
            weight_N=score_TE[rows.token_N, rows.expert_N],
            score_TE=score_TE,
            logit_TE=score_TE.where(score_TE != -torch.inf, 0.0),
            price_E=price_E,
            valid_T=valid_T,
            length=len(x_TD) if length is None else length,
            top_k=rows.top_k,
            k=self.top_k,
        )

    def observe(self, choice: Choice) -> None:
        """What is ruled out scores nothing in the statistics."""
        super().observe(replace(choice, score_TE=choice.logit_TE))

    def select_rows(self, priced_TE: Tensor, tokens: Tokens) -> Rows:
        """Without a balancer, what the host's own call answered: to the last tie."""
        if self._answer is not None and isinstance(self.balancer, Unpriced):
            return self._answer
        return super().select_rows(priced_TE, tokens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def answer(self, topk: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a call of torch.topk. -> what it would return"""
        score_TE, k = _asked(*args, **kwargs)
        if score_TE.ndim != 2 or score_TE.shape[1] != len(self.price_E) or k != self.top_k:
            return topk(*args, **kwargs)
        rows = self._replays.find()
        # Selective checkpointing hands out saved results in the order of the calls: a call must not be left out.
        if rows is None or torch._C._len_torch_dispatch_stack():
            with torch.no_grad():
                self._answer = token_major(topk(*args, **kwargs).indices)
        self.heard = self(score_TE, self.valid_T, rows)
        self._answer = None
        self._replays.keep(Rows(self.heard.token_N, self.heard.expert_N, self.heard.top_k))
        # Always a gather, as a recomputation must save what the first forward saved.
        expert_TK = self.heard.expert_TK.clamp(min=0)  # the host has no word for nowhere; `told` takes padding out
        return torch.return_types.topk((score_TE.gather(1, expert_TK), expert_TK))

    def told(self, expert_TK: Tensor, weight_TK: Tensor, rows: Rows | None) -> Choice:
        """What the host made of it: its experts, or those of `rows` in a recomputation, with its weights. A number
        beyond the last expert is how some hosts say nowhere."""
        num_experts = len(self.price_E)
        heard, self.heard = self.heard, None
        if rows is None:
            rows = token_major(expert_TK.to(torch.int64))
            rows = rows._replace(expert_N=rows.expert_N.where(rows.expert_N < num_experts, NOWHERE))
            if self.valid_T is not None:
                if len(self.valid_T) != len(expert_TK):
                    raise ValueError(
                        f"the attention mask tells of {len(self.valid_T)} tokens, this block was given "
                        f"{len(expert_TK)}; call remove() on what leave_padding_out returned"
                    )
                rows = rows._replace(expert_N=rows.expert_N.where(self.valid_T[rows.token_N], NOWHERE))
        if heard is None:
            if not isinstance(self.balancer, Unpriced):
                raise ValueError(
                    f"{self.balancer} sets prices, but this model's router does not choose by a top-k of "
                    f"{self.top_k} over {num_experts} experts; use balancer=None"
                )
            unknown_TE = weight_TK.new_zeros(1, 1, dtype=torch.float32).expand(len(expert_TK), num_experts)
            heard = self.forward(unknown_TE, self.valid_T, rows)  # no call: there is nothing that hooks could replay
        weight_N = weight_TK.reshape(-1)
        return replace(
            heard,
            token_N=rows.token_N,
            expert_N=rows.expert_N,
            wanted_N=rows.expert_N,
            weight_N=weight_N.where(rows.expert_N != NOWHERE, 0.0),
            top_k=rows.top_k,
        )

    def hear(self, block: nn.Module, args: Any) -> None:
        self.heard = None
        ear = _Ear(self)
        ear.__enter__()  # type: ignore[no-untyped-call]
        self._ears.append(ear)

    def go_deaf(self, block: nn.Module, args: Any, out: Any) -> None:
        if self._ears:
            self._ears.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"the host's, {self.schedule} of {len(self.price_E)}, {self.balancer}"


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
