"""Models and training loops for the doctor: healthy ones, which tests make ill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from moe import MoE, MoEConfig
from moe.doctor import Block, Report, Said, Weight, chosen, doctor
from placement import Placement
from routing import Balancer, Loss, LossFree

WORDS, DIM, EXPERTS = 40, 16, 4
Worlds = Callable[[int], Any]


def names(report: Report) -> set[str]:
    return {symptom.name for symptom in report.symptoms}


class LM(nn.Module):
    """A model of two MoE layers. told: its layers are told of padding."""

    def __init__(
        self,
        balancer: Balancer = LossFree(step=1e-2),
        *,
        losses: tuple[Loss, ...] = (),
        told: bool = True,
        group: Any = None,
        groups: tuple[Any, ...] | None = None,
        placement: Placement | None = None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MoEConfig(
            dim=DIM, hidden=8, num_experts=EXPERTS, top_k=2, balancer=balancer, losses=losses, shared_hidden=8
        )
        self.told, self.recompute = told, recompute
        self.embed = nn.Embedding(WORDS, DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(MoE(config, where, placement) for where in groups or (group, group))
        self.head = nn.Linear(DIM, WORDS, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.mix(self.embed(ids))
        valid = attention_mask.bool() if attention_mask is not None and self.told else None
        for layer in self.layers:
            x = x + through(self.recompute, lambda h, layer=layer: layer(F.layer_norm(h, (DIM,)), valid), x)
        return self.head(x)  # type: ignore[no-any-return]


def through(recompute: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if recompute == "none":
        return function(x)
    return checkpoint(function, x, use_reentrant=recompute == "reentrant")  # type: ignore[no-any-return]


def batches(count: int, *, padded: bool = False, seed: int = 0, rows: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, mask), with the last tokens of each sequence padding if wanted."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(1, WORDS, (rows, 16), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[:, 11:] = 0
        yield ids * mask, mask


def cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """To name the token itself; padding has no label."""
    return F.cross_entropy(logits.flatten(0, 1), ids.where(mask.bool(), -100).flatten())


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05)


def train(
    model: nn.Module,
    *,
    steps: int = 4,
    padded: bool = False,
    micro: int = 1,
    loss_of: Callable[[nn.Module, Tensor], Tensor] = lambda model, loss: loss,
    before_step: Callable[[nn.Module], object] = lambda model: None,
    after_step: Callable[[nn.Module], object] = lambda model: None,
    after_backward: Callable[[nn.Module], object] = lambda model: None,
    optimizer: Optimizer | None = None,
    seed: int = 0,
    rows: int = 4,
) -> list[float]:
    """-> the losses. loss_of(model, loss): of a micro-batch, as it goes backward."""
    optimizer = sgd(model) if optimizer is None else optimizer
    losses = []
    data = batches(steps * micro, padded=padded, seed=seed, rows=rows)
    for _ in range(steps):
        for _ in range(micro):
            ids, mask = next(data)
            loss = cross_entropy(model(ids, attention_mask=mask), ids, mask)
            loss_of(model, loss).backward()
            after_backward(model)
            losses.append(loss.item())
        before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)
    return losses


def examined(model: nn.Module, blocks: Any = (), **options: Any) -> Report:
    with doctor(model, blocks) as report:
        train(model, **options)
    return report.report


class Homemade(nn.Module):
    """A block as people write them: sigmoid scores, a bias for the choice, counts for its update.

    The healthy one counts real tokens in the first forward, and `update` moves the bias once a step. `wrong` names what
    is wrong with another.
    """

    bias: Tensor
    tokens_per_expert: Tensor

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong = wrong
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, DIM) * 0.3)
        self.body = Stacked()
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("tokens_per_expert", torch.zeros(EXPERTS))
        self.real: Tensor | None = None
        self.aux: Tensor | None = None
        self.told: Said | None = None

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, DIM)
        logits = self.gate(x_TD)
        if self.wrong == "bf16 router":
            logits = F.linear(x_TD.bfloat16(), self.gate.weight.bfloat16()).float()
        score_TE = logits.sigmoid()
        used_E = {"ignored": torch.zeros_like(self.bias), "reversed": -self.bias}.get(self.wrong, self.bias)
        expert_TK = (score_TE.detach() + used_E).topk(2, dim=-1).indices
        real_T = torch.ones(len(x_TD), dtype=torch.bool) if self.real is None else self.real
        counted = F.one_hot(expert_TK, EXPERTS).sum(dim=1)
        seen_T = torch.ones_like(real_T) if self.wrong == "counts padding" else real_T
        again = torch._C._current_graph_task_id() != -1
        with torch.no_grad():
            if self.training and (not again or self.wrong in ("counts twice", "moves in recompute")):
                self.tokens_per_expert += (counted * seen_T[:, None]).sum(dim=0)
                if self.wrong in ("moves in forward", "moves in recompute"):
                    self.update(0.01)
        pays_T = torch.ones_like(real_T) if self.wrong == "padding pays" else real_T
        probability_TE = score_TE / score_TE.sum(dim=-1, keepdim=True)
        share_E = (counted * pays_T[:, None]).sum(dim=0) / pays_T.sum()
        self.aux = EXPERTS * (share_E * (probability_TE * pays_T[:, None]).sum(dim=0) / pays_T.sum()).sum()
        choice = chosen(expert_TK, EXPERTS)
        self.told = Said(logits, choice, score_TE, -self.bias.clone(), None, x_TD, self.aux)
        self.listener(x_TD)
        weight_TE = (score_TE * choice).to(x_TD.dtype)
        return x + self.body(x_TD, weight_TE, self.up).view_as(x)

    def listener(self, x_TD: Tensor) -> None:
        """Nothing; the doctor's adapter listens here."""

    def update(self, step: float = 0.01) -> None:
        self.bias += step * (self.tokens_per_expert.mean() - self.tokens_per_expert).sign()
        self.tokens_per_expert.zero_()


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, 8) * 0.3)

    def forward(self, x_TD: Tensor, weight_TE: Tensor, up: Tensor) -> Tensor:
        h_TEF = torch.einsum("td,efd->tef", x_TD, up).relu()
        return torch.einsum("tef,edf,te->td", h_TEF, self.down, weight_TE)


class HomeLM(nn.Module):
    """Homemade blocks, with adapters for the doctor. Its forward hands out the sum of their balancing losses."""

    def __init__(self, *wrong: str, recompute: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.embed = nn.Embedding(WORDS, DIM)
        self.blocks = nn.ModuleList(Homemade(each) for each in (wrong or ("", "")))
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = F.layer_norm(self.embed(ids), (DIM,))
        for block in self.blocks:
            block.real = None if attention_mask is None else attention_mask.bool().reshape(-1)
            x = F.layer_norm(through(self.recompute, block, x), (DIM,))
        return self.head(x)  # type: ignore[no-any-return]

    def adapters(self) -> list[Block]:
        return [adapter(f"blocks.{number}", block) for number, block in enumerate(self.blocks)]


def adapter(name: str, block: Any) -> Block:
    def listen(tell: Callable[[Said], None]) -> list[Callable[[], None]]:
        block.listener = lambda x_TD: tell(block.told)
        return [lambda: block.__dict__.pop("listener")]

    return Block(
        name=name,
        module=block,
        num_experts=EXPERTS,
        listen=listen,
        top_k=2,
        router=block.gate,
        experts=block.body,
        down=lambda: (Weight(parameter=block.body.down, axis=1),),
        held=lambda: EXPERTS,
        price=lambda: -block.bias,
        counts=lambda: block.tokens_per_expert,
        moves=True,
    )


def with_aux(model: Any, loss: Tensor) -> Tensor:
    return loss + 0.01 * sum(block.aux for block in model.blocks)


def update(model: Any) -> None:
    for block in model.blocks:
        block.update()
