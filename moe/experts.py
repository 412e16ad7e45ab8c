"""Experts: the stacked feed-forward networks that a rank holds, run over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.comm import here, is_shard
from moe.dispatch import upload


class Activation(Protocol):
    @property
    def fan(self) -> int:
        """How many times as wide as its output its input is."""

    def __call__(self, h_MF: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """silu(gate) * up. The first half of the columns is the gate, the second half is up."""

    fan: int = 2

    def __call__(self, h_MF: Tensor) -> Tensor:
        gate_MF, up_MF = h_MF.chunk(2, dim=-1)
        return F.silu(gate_MF) * up_MF


@dataclass(frozen=True, kw_only=True)
class GELU:
    fan: int = 1

    def __call__(self, h_MF: Tensor) -> Tensor:
        return F.gelu(h_MF)


@dataclass(frozen=True, kw_only=True)
class ReLU2:
    """relu(h) ** 2"""

    fan: int = 1

    def __call__(self, h_MF: Tensor) -> Tensor:
        return F.relu(h_MF).square()


class Stack(NamedTuple):
    """The weights of some experts. up_AHD: [A, fan * hidden, dim]; down_ADF: [A, dim, hidden]; biases may be None."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


class Compute(Protocol):
    def __call__(self, row_MD: Tensor, rows_A: Sequence[int], stack: Stack, activation: Activation) -> Tensor:
        """row_MD sorted by expert, rows_A of them for each expert of the stack -> out_MD"""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One pair of matmuls an expert. Any type; best when experts have many rows."""

    def __call__(self, row_MD: Tensor, rows_A: Sequence[int], stack: Stack, activation: Activation) -> Tensor:
        outs = []
        # unbind, not stack.up[a]: the gradient of each index would be a full stack of zeros.
        parts = zip(torch.split(row_MD, list(rows_A)), *(_each(weight, len(rows_A)) for weight in stack), strict=True)
        for row, up, down, up_bias, down_bias in parts:
            assert up is not None
            assert down is not None
            outs.append(F.linear(activation(F.linear(row, up, up_bias)), down, down_bias))
        return torch.cat(outs) if outs else row_MD.clone()


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """One grouped matmul for all experts; best when experts have few rows, and on recent GPUs always.

    torch's kernel takes fp32, bf16 and fp16, and widths that are a multiple of 16 bytes.
    """

    def takes(self, stack: Stack) -> bool:
        dtype, widths = stack.up.dtype, (stack.up.shape[2], stack.down.shape[2])
        return dtype in (torch.float32, torch.bfloat16, torch.float16) and not any(
            width * dtype.itemsize % 16 for width in widths
        )

    def __call__(self, row_MD: Tensor, rows_A: Sequence[int], stack: Stack, activation: Activation) -> Tensor:
        if not self.takes(stack):
            raise ValueError(
                f"a grouped matmul takes fp32, bf16 or fp16 and widths of a multiple of 16 bytes; got "
                f"{stack.up.dtype}, dim {stack.up.shape[2]}, hidden {stack.down.shape[2]}; use Fastest() or Loop()"
            )
        row_A = upload([rows_A], row_MD.device)[0]
        offset_A = row_A.cumsum(0).to(torch.int32)
        h_MF = _grouped(row_MD, stack.up, stack.up_bias, row_A, offset_A)
        return _grouped(activation(h_MF), stack.down, stack.down_bias, row_A, offset_A)


@dataclass(frozen=True, kw_only=True)
class Fastest:
    """Grouped below `crossover` rows an expert and on GPUs, Loop above and wherever Grouped cannot run.

    Measured by scripts/bench/experts.py on a CPU: forward and backward together, Grouped takes 0.6-0.8 of Loop's time
    at 8 to 32 rows an expert, 0.9-1.0 at 128, 1.0-1.1 at 256. Forward alone it gains nothing and loses up to a quarter
    at 256 rows: for inference on a CPU use Loop(). (Not chosen by grad mode: a recomputation must repeat its forward.)
    """

    crossover: int = 256

    def __call__(self, row_MD: Tensor, rows_A: Sequence[int], stack: Stack, activation: Activation) -> Tensor:
        few = len(row_MD) < self.crossover * len(rows_A)
        fits = len(row_MD) > 0 and Grouped().takes(stack)
        grouped = fits and (few if row_MD.device.type == "cpu" else stack.up.dtype == torch.bfloat16)
        return (Grouped() if grouped else Loop())(row_MD, rows_A, stack, activation)


class Experts(nn.Module):
    """The experts of this rank, stacked in the order of expert_ids.

    up: [S, fan * hidden, dim], for SwiGLU the gate's rows first; down: [S, dim, hidden]; biases if asked for. The
    initial weights of an expert depend on torch's seed and its id alone, so any number of ranks starts alike.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        expert_ids: Sequence[int],
        *,
        activation: Activation = SwiGLU(),
        bias: bool = False,
        compute: Compute = Fastest(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.expert_ids = tuple(int(expert) for expert in expert_ids)
        self.activation, self.compute = activation, compute
        shapes: dict[str, tuple[int, ...]] = {"up": (activation.fan * hidden, dim), "down": (dim, hidden)}
        if bias:
            shapes |= {"up_bias": (activation.fan * hidden,), "down_bias": (dim,)}
        for name in Stack._fields:
            self.register_parameter(name, None)
        for name, shape in shapes.items():
            weight = torch.empty(len(self.expert_ids), *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in 1/sqrt(inputs), as nn.Linear, from a generator of each expert's own."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        if self.up.is_meta:
            return
        for slot, expert in enumerate(self.expert_ids):
            generator = torch.Generator("cpu").manual_seed((seed + 0x9E3779B97F4A7C15 * (expert + 1)) % 2**63)
            for name, weight in self.named_parameters():
                bound = (self.up if name.startswith("up") else self.down).shape[2] ** -0.5
                drawn = torch.rand(weight.shape[1:], generator=generator, device="cpu", dtype=torch.float32)
                weight[slot].copy_(drawn * (2 * bound) - bound)

    def rehouse(self, expert_ids: Sequence[int], weights: Mapping[str, Tensor]) -> None:
        """Hold other experts from now on. The parameters stay the objects they are, for whoever refers to them."""
        for name, weight in self.named_parameters():
            wanted = (len(expert_ids), *weight.shape[1:])
            if weights[name].shape != wanted or weights[name].dtype != weight.dtype:
                raise ValueError(f"{name} of {len(expert_ids)} experts needs {wanted}, {weight.dtype}; got "
                                 f"{tuple(weights[name].shape)}, {weights[name].dtype}")  # fmt: skip
        for name, weight in self.named_parameters():
            # A graph that somebody still holds keeps the weight's gradient node, which knows the old shape; of a weight
            # that had another type meanwhile, torch makes a new one.
            weight.data = weight.new_empty(0, dtype=torch.float32 if weight.dtype == torch.float64 else torch.float64)
            weight.data = weights[name]
            weight.grad = None
        self.expert_ids = tuple(expert_ids)

    def check_whole(self) -> None:
        """Experts are told apart by their lines in plain tensors."""
        if any(is_shard(weight) for weight in self.parameters()):
            raise ValueError(
                "these experts are DTensors, which stay where they are; save and load them with "
                "torch.distributed.checkpoint, which takes them to any number of ranks"
            )

    def stack(self) -> Stack:
        """What this rank computes with: of a DTensor, its part."""
        up_bias, down_bias = (None if bias is None else here(bias) for bias in (self.up_bias, self.down_bias))
        return Stack(here(self.up), here(self.down), up_bias, down_bias)

    def forward(self, row_MD: Tensor, rows_A: Sequence[int], own: Stack, visiting: Stack) -> Tensor:
        """row_MD: the rows of each own expert, then of each visiting one, rows_A of them each. -> out_MD"""
        dtype = compute_dtype(row_MD)
        row_MD = row_MD.to(dtype)
        if not rows_A:
            return self._idle(row_MD, _cast(own, dtype))
        num_own = len(own.up)
        row_own, row_visiting = torch.split(row_MD, [sum(rows_A[:num_own]), sum(rows_A[num_own:])])
        out_own = self.compute(row_own, rows_A[:num_own], _cast(own, dtype), self.activation)
        if len(visiting.up) == 0:
            return out_own
        out_visiting = self.compute(row_visiting, rows_A[num_own:], _cast(visiting, dtype), self.activation)
        return torch.cat([out_own, out_visiting])

    def _idle(self, row_MD: Tensor, own: Stack) -> Tensor:
        """No expert and no row, but every weight in the graph: in backward, other ranks wait for this one to `lend`."""
        up_bias, down_bias = (None if bias is None else bias.sum(0) for bias in own[2:])
        return F.linear(self.activation(F.linear(row_MD, own.up.sum(0), up_bias)), own.down.sum(0), down_bias)

    def extra_repr(self) -> str:
        return f"experts {list(self.expert_ids)}, {self.up.shape[2]} -> {self.down.shape[2]}, {self.activation}"


class Shared(nn.Module):
    """An ordinary feed-forward network that every token visits besides the experts it chose. Alike on every rank."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: Activation,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, activation.fan * hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down(self.activation(self.up(x_TD)))
        return y_TD


def _each(weight: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return (None,) * count if weight is None else weight.unbind(0)


def _grouped(row_MD: Tensor, weight: Tensor, bias: Tensor | None, row_A: Tensor, offset_A: Tensor) -> Tensor:
    out_MF = F.grouped_mm(row_MD, weight.transpose(1, 2), offs=offset_A)
    if bias is not None:
        out_MF = out_MF + bias.repeat_interleave(row_A, dim=0, output_size=len(row_MD))
    return out_MF


def compute_dtype(row_MD: Tensor) -> torch.dtype:
    """The type of the matmuls: autocast's where it is on, else that of the rows."""
    device = row_MD.device.type
    if torch.is_autocast_enabled(device) and row_MD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return row_MD.dtype


def _cast(stack: Stack, dtype: torch.dtype) -> Stack:
    up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in stack[2:])
    return Stack(stack.up.to(dtype), stack.down.to(dtype), up_bias, down_bias)
