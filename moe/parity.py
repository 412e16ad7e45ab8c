"""assert_ep_parity: is an expert-parallel layer, anybody's, the same function on R ranks as on one?

The layer is built by 1 and by R gloo processes with the same weights and given the same tokens. Outputs, the gradient
of every input and parameter, and the gradient norm must agree: on ordinary batches, and on those that break layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.clip import grad_norm
from moe.comm import Group, Peers, World, WorldError, gather_objects, sum_over, world_group
from moe.layer import MoE


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch. tokens_R: tokens of each rank, repeated as often as there are ranks to fill."""

    name: str
    tokens_R: tuple[int, ...]
    alike: bool = False
    recompute: Literal["none", "reentrant", "non-reentrant"] = "none"
    steps: int = 1


CASES = (
    Case(name="even", tokens_R=(24,)),
    Case(name="ragged", tokens_R=(5, 17, 29, 8)),
    Case(name="empty rank", tokens_R=(16, 0, 16)),
    Case(name="nothing at all", tokens_R=(0,)),
    Case(name="one hot expert", tokens_R=(16,), alike=True),
    Case(name="recompute, reentrant", tokens_R=(16, 3), recompute="reentrant"),
    Case(name="recompute, non-reentrant", tokens_R=(16, 3), recompute="non-reentrant"),
    Case(name="accumulated", tokens_R=(7, 12), steps=3),
)


class Piece(NamedTuple):
    """parameter[here], of a layer on one of R ranks, is parameter `name` of the layer on one rank, at [there]."""

    parameter: nn.Parameter
    here: slice
    name: str
    there: slice


MakeLayer = Callable[[Group], nn.Module]
Call = Callable[[nn.Module, Tensor], Any]
Pieces = Callable[[nn.Module, Mapping[str, torch.Size], Peers], Sequence[Piece]]


def call_layer(layer: nn.Module, x_TD: Tensor) -> Any:
    return layer(x_TD)


def find_pieces(layer: nn.Module, shape_of: Mapping[str, torch.Size], peers: Peers) -> list[Piece]:
    """evenmoe layers by expert id; else a parameter shorter than on one rank is a run of it, in the order of the ranks.

    shape_of: the shapes on one rank, by name.
    """
    pieces, known = [], set()
    for prefix, module in layer.named_modules():
        if isinstance(module, MoE):
            for name, weight in module.experts.named_parameters():
                full = f"{prefix}.experts.{name}".lstrip(".")
                known.add(full)
                pieces.append(Piece(weight, slice(0), full, slice(0)))  # a rank may hold no expert at all
                for slot, expert in enumerate(module.experts.expert_ids):
                    pieces.append(Piece(weight, slice(slot, slot + 1), full, slice(expert, expert + 1)))
    lengths = gather_objects({name: p.shape[:1].numel() for name, p in layer.named_parameters()}, peers)
    for name, parameter in layer.named_parameters():
        if name not in shape_of:
            raise ValueError(f"parameter {name!r} does not exist on one rank; tell assert_ep_parity its pieces=")
        if name in known or parameter.shape == shape_of[name]:
            continue
        before = sum(lengths[rank][name] for rank in range(peers.rank))
        pieces.append(Piece(parameter, slice(None), name, slice(before, before + len(parameter))))
    return pieces


def assert_ep_parity(
    make_layer: MakeLayer,
    *,
    dim: int,
    ranks: Sequence[int] = (2, 3, 4),
    cases: Sequence[Case] = CASES,
    tolerance: float = 1e-10,
    dtype: torch.dtype = torch.float64,
    call: Call = call_layer,
    pieces: Pieces = find_pieces,
    norm: Callable[[nn.Module], Tensor] = grad_norm,
    timeout: timedelta = timedelta(seconds=60),
) -> None:
    """Raise AssertionError, naming every case and quantity that differs, unless the layer is the same on all `ranks`.

    make_layer(group) builds the layer on the ranks of a group; it, and the functions below, must be importable by name.
    Numbers of ranks that do not divide the experts test uneven experts; leave them out if the layer cannot have them.
    tolerance: of the largest difference, relative to the largest value if that exceeds 1. call(layer, x): how to run
    it, [tokens, dim] -> [tokens, dim] or a tuple that begins with it. pieces: which parts of which parameters a rank
    holds. norm(layer): its global gradient norm; the gradients of replicated parameters are summed before.
    """
    job = _Job(make_layer, dtype, call, pieces, norm)
    problems = []
    with World(1, timeout=timeout) as alone:
        for size in ranks:
            batches = [[_tokens(case, size, step, dim, dtype) for step in range(case.steps)] for case in cases]
            try:
                truth = alone.run(_run_all, job, None, cases, batches)[0]
            except WorldError as error:
                raise AssertionError(f"the layer fails on one rank already:\n{error}") from None
            with World(size, timeout=timeout) as world:
                for index, case in enumerate(cases):
                    try:
                        answers = world.run(_run_all, job, truth.state, [case], [batches[index]])
                    except WorldError as error:
                        problems.append(f"{size} ranks, {case.name}: failed\n{error}")
                        continue
                    parts = [answer.results[0] for answer in answers]
                    for what, error_, bound in _differences(truth.results[index], parts, tolerance):
                        problems.append(
                            f"{size} ranks, {case.name}: {what} differs by {error_:.3g}; allowed {bound:.3g}"
                        )
    if problems:
        raise AssertionError("not the same layer on one rank and on many:\n" + "\n".join(problems))


class _Job(NamedTuple):
    """What assert_ep_parity was told about the layer."""

    make_layer: MakeLayer
    dtype: torch.dtype
    call: Call
    pieces: Pieces
    norm: Callable[[nn.Module], Tensor]


class _Result(NamedTuple):
    """One rank's share of a case. grads: (name, at, gradient) of pieces; summed: of parameters that all ranks hold."""

    y: list[Tensor]
    dx: list[Tensor]
    grads: list[tuple[str, slice, Tensor]]
    summed: dict[str, Tensor]
    norm: Tensor


class _Answer(NamedTuple):
    state: dict[str, Tensor]
    results: list[_Result]


def _tokens(case: Case, ranks: int, step: int, dim: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(input, weight of each output in the loss) for each rank; nearly alike tokens choose the same experts."""
    generator = torch.Generator().manual_seed(1234 + step)
    common = torch.randn(dim, generator=generator, dtype=torch.float64)
    batch = []
    for rank in range(ranks):
        shape = (case.tokens_R[rank % len(case.tokens_R)], dim)
        x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        batch.append(((common + 1e-3 * x if case.alike else x).to(dtype), weight.to(dtype)))
    return batch


def _run_all(
    job: _Job,
    state: dict[str, Tensor] | None,
    cases: Sequence[Case],
    batches: Sequence[Sequence[list[tuple[Tensor, Tensor]]]],
) -> _Answer:
    """On every rank. With state, take its weights and run this rank's tokens; without, run all tokens and return it."""
    torch.manual_seed(0)
    group = world_group()
    layer = job.make_layer(group).to(job.dtype)
    peers = Peers.of(group)
    held: Sequence[Piece] = ()
    if state is not None:
        held = job.pieces(layer, {name: value.shape for name, value in state.items()}, peers)
        _load(layer, state, held)
    results = []
    for case, steps in zip(cases, batches, strict=True):
        layer.zero_grad(set_to_none=True)
        mine = [batch if state is None else [batch[peers.rank]] for batch in steps]
        results.append(_run(job, layer, case, mine, held, peers))
    tensors = {name: value.detach().clone() for name, value in [*layer.named_parameters(), *layer.named_buffers()]}
    return _Answer(tensors, results)


def _load(layer: nn.Module, state: Mapping[str, Tensor], held: Sequence[Piece]) -> None:
    partial = {id(piece.parameter) for piece in held}
    with torch.no_grad():
        for piece in held:
            piece.parameter[piece.here].copy_(state[piece.name][piece.there])
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if id(tensor) not in partial and name in state and tensor.shape == state[name].shape:
                tensor.copy_(state[name])


def _run(
    job: _Job,
    layer: nn.Module,
    case: Case,
    steps: Sequence[Sequence[tuple[Tensor, Tensor]]],
    held: Sequence[Piece],
    peers: Peers,
) -> _Result:
    ys, dxs = [], []
    for batch in steps:
        x = torch.cat([x for x, _ in batch]).requires_grad_()
        if case.recompute == "none":
            y = job.call(layer, x)
        else:
            y = checkpoint(job.call, layer, x, use_reentrant=case.recompute == "reentrant")
        y = y[0] if isinstance(y, tuple) else y
        (y * torch.cat([weight for _, weight in batch])).sum().backward()
        ys.append(y.detach())
        dxs.append(x.grad if x.grad is not None else torch.zeros_like(x))
    partial = {id(piece.parameter) for piece in held}
    whole = {name: p for name, p in layer.named_parameters() if id(p) not in partial and p.requires_grad}
    for parameter in whole.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    sum_over([parameter.grad for parameter in whole.values() if parameter.grad is not None], peers)
    grads = [(p.name, p.there, _grad(p.parameter)[p.here]) for p in held if p.parameter.requires_grad]
    return _Result(ys, dxs, grads, {name: _grad(p) for name, p in whole.items()}, job.norm(layer).detach())


def _grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _differences(truth: _Result, parts: Sequence[_Result], tolerance: float) -> list[tuple[str, float, float]]:
    """(what, difference, allowed) of everything that is too far off."""
    pairs = []
    for step, (y, dx) in enumerate(zip(truth.y, truth.dx)):
        pairs.append(("output", torch.cat([part.y[step] for part in parts]), y))
        pairs.append(("input gradient", torch.cat([part.dx[step] for part in parts]), dx))
    found = [
        (f"gradient of {name}: rows {rows} have one on no rank; it", float("nan"), 0.0)
        for name, rows in _unseen(truth, parts)
    ]
    for rank, part in enumerate(parts):
        for name, there, grad in part.grads:
            pairs.append(
                (f"gradient of {name}[{there.start}:{there.stop}] on rank {rank}", grad, truth.summed[name][there])
            )
        pairs += [
            (f"gradient of {name} on rank {rank}", grad, truth.summed[name]) for name, grad in part.summed.items()
        ]
        pairs.append((f"gradient norm on rank {rank}", part.norm.reshape(1), truth.norm.reshape(1)))
    for what, got, want in pairs:
        if got.shape != want.shape:
            found.append((f"{what}: shape {list(got.shape)} for {list(want.shape)}, which", float("nan"), 0.0))
        elif want.numel():
            error = (got.double() - want.double()).abs().max().item()
            allowed = tolerance * max(1.0, want.abs().max().item())
            if not error <= allowed:
                found.append((what, error, allowed))
    return found


def _unseen(truth: _Result, parts: Sequence[_Result]) -> list[tuple[str, list[int]]]:
    """Rows of parameters with a gradient on one rank that none of many ranks has."""
    unseen = []
    for name, grad in truth.summed.items():
        if any(name in part.summed for part in parts):
            continue
        rows = set(range(len(grad) if grad.ndim else 1))
        for part in parts:
            for piece, there, _ in part.grads:
                if piece == name:
                    rows -= set(range(len(grad))[there])
        if rows:
            unseen.append((name, sorted(rows)))
    return unseen
