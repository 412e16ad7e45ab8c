"""Published shapes on one device: the tensors of one layer, and every way here of computing it.

Each way starts from the chosen experts and their weights, sorts, computes and adds up. Ours waits for the counts on the
host, as the layer does.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import Experts, Fastest, Fused, SwiGLU
from moe.comm import Peers
from moe.compute import Compute
from moe.dispatch import Dispatch
from moe.guests import Nobody
from placement import RoundRobin, Topology
from routing import AtHome, Choice
from scripts.bench.dense import dense
from scripts.bench.loads import LOADS, Case

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """experts: of the whole layer. held: of these, by the one rank whose layer is timed. tokens: at that rank."""

    dim: int
    hidden: int
    experts: int
    held: int
    top_k: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    def flops(self, *, backward: bool, rows: int | None = None) -> float:
        """Of the matmuls: gate, up and down; twice as many again on the way back."""
        forward = 6.0 * self.dim * self.hidden * (self.rows if rows is None else rows)
        return forward * (3 if backward else 1)


SHAPES = {
    "oss120": Shape(dim=2880, hidden=2880, experts=128, held=128, top_k=4, tokens=32768),
    "dsv3r": Shape(dim=7168, hidden=2048, experts=256, held=32, top_k=8, tokens=32768),
    "qwen30": Shape(dim=2048, hidden=768, experts=128, held=128, top_k=8, tokens=32768),
}
TINY = {
    "oss120": Shape(dim=16, hidden=16, experts=8, held=8, top_k=4, tokens=32),
    "dsv3r": Shape(dim=32, hidden=16, experts=16, held=8, top_k=4, tokens=32),
    "qwen30": Shape(dim=16, hidden=8, experts=8, held=8, top_k=2, tokens=32),
}


def experts_of(shape: Shape, held: int, device: torch.device, dtype: torch.dtype) -> Experts:
    """Random experts, drawn on the device: to draw 3 billion numbers on a host takes longer than to time them."""
    with torch.device("meta"):
        experts = Experts(shape.dim, shape.hidden, range(held), dtype=dtype)
    experts.to_empty(device=device)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
    return experts


class Layer:
    """One shape under one load, on one device."""

    def __init__(self, shape: Shape, load: str, experts: Experts, *, backward: bool) -> None:
        self.shape, self.experts, self.backward = shape, experts.requires_grad_(backward), backward
        self.device, self.dtype = experts.up.device, experts.up.dtype
        case = Case(ranks=1, experts=shape.held, top_k=shape.top_k, tokens=shape.tokens)
        self.expert_TK = LOADS[load].choices(case, 0)[0].to(self.device)
        weight_TK = torch.rand(shape.tokens, shape.top_k, device=self.device).softmax(dim=-1)
        self.weight_TK = weight_TK.requires_grad_(backward)
        self.x_TD = self._random(shape.tokens, shape.dim).requires_grad_(backward)
        self.dy_TD = self._random(shape.tokens, shape.dim)

    def candidates(self) -> dict[str, Run]:
        ways = {"ours": self.ours(Fastest()), "again": self.ours(Fastest()), "torch grouped": self.torch_grouped}
        ways |= {"Fused": self.fused}
        ways |= {"HF grouped": self.hugging_face("grouped_mm"), "HF eager": self.hugging_face("eager")}
        return {"ceiling": self.ceiling(), **{name: self.step(way) for name, way in ways.items()}}

    def step(self, way: Callable[[], Tensor]) -> Run:
        """Forward, or forward and backward; gradients are made and let go."""
        wanted = [self.x_TD, self.weight_TK, *self.experts.parameters()]

        def once() -> None:
            with torch.set_grad_enabled(self.backward):
                y_TD = way()
            if self.backward:
                torch.autograd.grad(y_TD, wanted, self.dy_TD)

        return once

    def choice(self) -> Choice:
        shape, expert_N = self.shape, self.expert_TK.flatten()
        empty_TE = torch.empty(shape.tokens, shape.held, device="meta")  # nobody looks into the scores
        return Choice(
            token_N=torch.arange(shape.tokens, device=self.device).repeat_interleave(shape.top_k),
            expert_N=expert_N,
            wanted_N=expert_N,
            weight_N=self.weight_TK.flatten(),
            score_TE=empty_TE,
            logit_TE=empty_TE,
            price_E=torch.zeros(shape.held, device=self.device),
            valid_T=None,
            length=shape.tokens,
            top_k=shape.top_k,
            k=shape.top_k,
        )

    def ours(self, compute: Compute) -> Callable[[], Tensor]:
        held = self.shape.held
        home = RoundRobin().place(held, Topology.fitting(num_experts=held, ranks=1, ranks_per_node=1))

        def run() -> Tensor:
            choice = self.choice()
            assignment = AtHome()(choice.load_E.cpu().numpy()[None], home)
            dispatch = Dispatch.of(choice, assignment, list(range(held)), Peers.of(None))
            self.experts.compute = compute
            y_TD: Tensor = self.experts(self.x_TD, choice.weight_N, dispatch, self.experts.stack(), Nobody())
            return y_TD

        return run

    def fused(self) -> Tensor:
        """In Triton's kernels, and nothing else in their name."""
        if self.device.type != "cuda" or not Fused().takes(self.experts.stack()):
            raise RuntimeError("no GPU, or no Triton")
        try:
            return self.ours(Fused())()
        except Exception as failure:  # Triton's own kinds must not end the other candidates
            raise RuntimeError(str(failure)) from failure

    def torch_grouped(self) -> Tensor:
        """As one would write it with torch's grouped matmul and its autograd, without a host synchronisation."""
        shape, expert_N = self.shape, self.expert_TK.flatten()
        order_N = expert_N.argsort(stable=True)
        load_E = expert_N.new_zeros(shape.held).scatter_add_(0, expert_N, torch.ones_like(expert_N))
        end_E = load_E.cumsum(0).to(torch.int32)
        h_NF = F.grouped_mm(self.x_TD[order_N // shape.top_k], self.experts.up.transpose(1, 2), offs=end_E)
        y_ND = F.grouped_mm(SwiGLU()(h_NF), self.experts.down.transpose(1, 2), offs=end_E)
        y_ND = y_ND * self.weight_TK.flatten()[order_N, None].to(self.dtype)
        return y_ND[order_N.argsort()].view(shape.tokens, shape.top_k, -1).sum(dim=1)

    def hugging_face(self, implementation: str) -> Callable[[], Tensor]:
        """transformers' Qwen3 experts. What is missing or refused is said when it is run."""

        def run() -> Tensor:
            y_TD: Tensor = self._module(implementation)(self.x_TD, self.expert_TK, self.weight_TK.to(self.dtype))
            return y_TD

        return run

    def ceiling(self) -> Run:
        """Two dense matmuls of all rows, six with backward."""
        return dense(self._random, self.shape.rows, self.shape.dim, self.shape.hidden, self.backward)

    def error(self) -> float:
        """|ours - torch grouped| / |torch grouped|: both must be the same function before either is timed."""
        with torch.no_grad():
            ours, theirs = self.ours(Fastest())().double(), self.torch_grouped().double()
        return float((ours - theirs).norm() / theirs.norm())

    def _module(self, implementation: str) -> nn.Module:
        if importlib.util.find_spec("transformers") is None:
            raise ImportError("transformers is not installed")
        qwen = "transformers.models.qwen3_moe."
        config = importlib.import_module(f"{qwen}configuration_qwen3_moe").Qwen3MoeConfig(
            num_experts=self.shape.held,
            hidden_size=self.shape.dim,
            moe_intermediate_size=self.shape.hidden,
            num_experts_per_tok=self.shape.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module: nn.Module = importlib.import_module(f"{qwen}modeling_qwen3_moe").Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = self.experts.up, self.experts.down
        return module

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)
