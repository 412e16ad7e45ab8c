"""A router whose weights and scores are a host's: it is asked whom to choose, and told what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe.recompute import Replays
from routing import NOWHERE, Balancer, Choice, Router, Rows, Tokens, Unpriced, at_least_fp32, token_major


class ToldRouter(Router):
    """scores_TE -> Choice, for the top-k of a host. It has prices and statistics; the weights are the host's."""

    def __init__(self, num_experts: int, top_k: int, *, balancer: Balancer, device: torch.device | str) -> None:
        super().__init__(1, num_experts, top_k, balancer=balancer, device="meta")
        self.weight = None  # type: ignore[assignment]
        self.to_empty(device=device)
        self.reset_parameters()
        self.heard: Choice | None = None
        self._answer: Rows | None = None
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

    def select_rows(self, score_TE: Tensor, price_E: Tensor, tokens: Tokens) -> Rows:
        """Without a balancer, what the host's own call answered: to the last tie."""
        if self._answer is not None and isinstance(self.balancer, Unpriced):
            return self._answer
        return super().select_rows(score_TE, price_E, tokens)

    def ask(self, score_TE: Tensor, host: Callable[[Tensor], Tensor], valid_T: Tensor | None = None) -> Tensor:
        """In place of the host's own choice. host: scores -> the experts it would take, [T, K]. -> expert_TK

        In a recomputation it is the choice that was made before; padding chooses what the host would.
        """
        rows = self._replays.find()
        # Selective checkpointing hands out saved results in the order of the calls: a call must not be left out.
        if rows is None or valid_T is not None or torch._C._len_torch_dispatch_stack():
            with torch.no_grad():
                self._answer = token_major(host(score_TE))
        self.heard = self(score_TE, valid_T, rows=rows)
        expert_TK = self.heard.expert_TK
        if valid_T is not None:
            assert self._answer is not None
            expert_TK = expert_TK.where(valid_T[:, None], self._answer.expert_N.view_as(expert_TK))
        self._answer = None
        self._replays.keep(Rows(self.heard.token_N, self.heard.expert_N, self.heard.top_k))
        return expert_TK

    def told(self, expert_TK: Tensor, weight_TK: Tensor, rows: Rows | None, valid_T: Tensor | None = None) -> Choice:
        """What the host made of it: its experts, or those of `rows` in a recomputation, with its weights. A number
        beyond the last expert is how some hosts say nowhere."""
        num_experts = len(self.price_E)
        heard, self.heard = self.heard, None
        if rows is None:
            rows = token_major(expert_TK.to(torch.int64))
            rows = rows._replace(expert_N=rows.expert_N.where(rows.expert_N < num_experts, NOWHERE))
        if heard is None:
            if not isinstance(self.balancer, Unpriced):
                raise ValueError(
                    f"{self.balancer} sets prices, but this model's router does not choose by a top-k of "
                    f"{self.top_k} over {num_experts} experts; use balancer=None"
                )
            unknown_TE = weight_TK.new_zeros(1, 1, dtype=torch.float32).expand(len(expert_TK), num_experts)
            heard = self.forward(unknown_TE, valid_T, rows=rows)  # no call: there is nothing that hooks could replay
        weight_N = weight_TK.reshape(-1)
        return replace(
            heard,
            token_N=rows.token_N,
            expert_N=rows.expert_N,
            wanted_N=rows.expert_N,
            weight_N=weight_N.where(rows.expert_N != NOWHERE, 0.0),
            top_k=rows.top_k,
        )

    def extra_repr(self) -> str:
        return f"the host's, {self.schedule} of {len(self.price_E)}, {self.balancer}"
