"""The Triton kernels compute what torch does: in Triton's interpreter on a CPU, as binaries where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import GELU, Experts, Fastest, Fused, SwiGLU, World, launch
from moe.activation import Activation
from moe.fused import Plan, Tiles, combined, moved, through
from moe.guests import Nobody
from moe.launch import Share, Tile, kernels_refuse
from moe.stack import Rows
from tests.fenced import fenced
from tests.moe.test_planned import _exact
from tests.moe.test_visit import alone, choose, literal

Worlds = Callable[[int], World]
LAW = settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])  # the interpreter is slow
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    device = torch.device(request.param)
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")
    if (reason := kernels_refuse(torch.zeros(1, device=device), torch.float32)) is not None:
        pytest.skip(reason)
    with fenced() if device.type == "cpu" else nullcontext():
        yield device


@pytest.fixture(scope="module")
def small_tiles(device: torch.device) -> Iterator[None]:
    """In the interpreter: it takes as long for a tile of nothing as for a full one."""
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            patch.setattr(launch, "tile_of", lambda rows, experts, dtype: Tile(16, 32, 16, 4, 2))
            patch.setattr(launch, "outer_tile_of", lambda dtype: Tile(32, 32, 16, 4, 2))
        yield


def error(got: Tensor, want: Tensor) -> float:
    """Relative to what is wanted; where that is little, because terms cancel, to terms of a size of 0.3."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=max(0.3 * want.numel() ** 0.5, 1e-6)))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Experts, Tensor, Tensor, Tensor]:
    """Experts in float64, x, the weights of choices, and the experts chosen. Some choices go nowhere, some experts get
    none, one may get all; widths fit no tile."""
    experts, top_k, tokens = (
        draw(st.integers(1, 20)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0, 1, 15, 50])),
    )
    dim, hidden = draw(st.sampled_from([1, 17, 32, 40])), draw(st.sampled_from([3, 16, 34]))
    activation: Activation = draw(st.sampled_from([SwiGLU(), GELU()]))
    torch.manual_seed(draw(st.integers(0, 99)))
    few = draw(st.integers(1, experts))
    stack = Experts(dim, hidden, range(experts), activation=activation, bias=draw(st.booleans()), dtype=torch.float64)
    expert_TK = torch.randint(draw(st.sampled_from([-1, 0])), few, (tokens, top_k))
    if draw(st.booleans()):  # those without rows come first
        expert_TK = torch.where(expert_TK < 0, expert_TK, experts - 1 - expert_TK)
    weight_TK = torch.randn(tokens, top_k).double() * (expert_TK >= 0)
    return stack, torch.randn(tokens, dim).double(), weight_TK, expert_TK


def stepped(run: Callable[[], Tensor], leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """y, and all gradients, of a loss that tells all entries of y apart."""
    y_TD = run()
    dy_TD = torch.linspace(-1, 2, y_TD.numel()).view(y_TD.shape).sin().to(dtype).to(y_TD)
    return [y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@given(layer=layers())
@LAW
def test_results_and_all_gradients_are_the_literal_formulas(
    device: torch.device, dtype: torch.dtype, layer: tuple[Experts, Tensor, Tensor, Tensor]
) -> None:
    """In float64, from the same rounded numbers."""
    experts, *given_, expert_TK = layer
    with torch.no_grad():
        for tensor in (*experts.parameters(), *given_):
            tensor.copy_(tensor.to(dtype))

    def leaves() -> list[Tensor]:
        return [*given_, *experts.parameters()]

    for leaf in leaves():
        leaf.requires_grad_()
    x_TD, weight_TK = given_
    choice = choose(expert_TK, len(experts.expert_ids), weight_TK)
    want = stepped(lambda: literal(x_TD, choice, experts), leaves(), dtype)
    experts, experts.compute = experts.to(device, dtype), Fused()
    x_TD, weight_TK = given_ = [
        tensor.detach().to(device, wide).requires_grad_()
        for tensor, wide in ((x_TD, dtype), (weight_TK, torch.float32))
    ]
    choice = choose(expert_TK.to(device), len(experts.expert_ids), weight_TK)
    dispatch, stack = alone(choice), experts.stack()

    def ours() -> Tensor:
        y_TD: Tensor = experts(x_TD, choice.weight_N, dispatch, stack, Nobody())
        return y_TD

    got = stepped(ours, leaves(), dtype)
    assert max(error(one, other) for one, other in zip(got, want, strict=True)) < BOUNDS[dtype]
    assert all(torch.equal(one, other) for one, other in zip(stepped(ours, leaves(), dtype), got, strict=True))
    with torch.no_grad():
        assert torch.equal(ours(), got[0])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@given(seed=st.integers(0, 99), top_k=st.integers(1, 9), width=st.sampled_from([1, 130, 1030]))
@LAW
def test_rows_that_move_and_rows_that_are_added_are_torchs(
    device: torch.device, dtype: torch.dtype, seed: int, top_k: int, width: int
) -> None:
    """Negative places hold no row. Both gradients are those of autograd, in fp32 and rounded once."""
    generator = torch.Generator().manual_seed(seed)
    tokens = seed % 7
    place_N = torch.randperm(tokens * top_k + 3, generator=generator)[: tokens * top_k]
    place_N[torch.rand(len(place_N), generator=generator) < 0.2] = -1
    place_TK = place_N.view(tokens, top_k)
    row_XD = torch.randn(tokens * top_k + 3, width, generator=generator).to(dtype).float().requires_grad_()
    weight_TK = torch.randn(tokens, top_k, generator=generator).requires_grad_()
    dy_TD = torch.randn(tokens, width, generator=generator).to(dtype)
    picked_TKD = row_XD[place_TK.clamp(min=0)].where(place_TK[..., None] >= 0, 0.0)
    y_TD = (picked_TKD * weight_TK[..., None]).sum(dim=1)
    want = [y_TD, *torch.autograd.grad(y_TD, [row_XD, weight_TK], dy_TD.float())]
    row_XD, weight_TK = (
        row_XD.detach().to(device, dtype).requires_grad_(),
        weight_TK.detach().to(device).requires_grad_(),
    )
    y_TD = combined(row_XD, place_TK.to(device), weight_TK)
    got = [y_TD, *torch.autograd.grad(y_TD, [row_XD, weight_TK], dy_TD.to(device))]
    assert max(error(one, other) for one, other in zip(got, want, strict=True)) < BOUNDS[dtype]
    there_N = place_N >= 0
    inverse_X = torch.full((len(row_XD),), -1).index_put_((place_N[there_N],), torch.arange(len(place_N))[there_N])
    moved_ND = moved(row_XD, place_N.to(device), inverse_X[:, None].to(device))
    assert torch.equal(moved_ND.cpu(), picked_TKD.detach().reshape(-1, width).to(dtype))
    back_ND = torch.randn(len(place_N) + 1, width, generator=generator).to(dtype)
    (drow_XD,) = torch.autograd.grad(moved_ND, row_XD, back_ND[:-1].to(device))
    assert torch.equal(drow_XD.cpu(), back_ND[inverse_X].where(inverse_X[:, None] >= 0, 0.0))


def test_room_without_rows_is_neither_read_nor_computed(device: torch.device) -> None:
    """Where the host knows only how many rows there may be: NaN lies in wait behind the last."""
    torch.manual_seed(0)
    stack, many = Experts(20, 24, range(5), device=device).stack(), 80
    row_A = torch.tensor([30, 0, 1, 17, 0], device=device)
    source_XD, live = torch.randn(many, 20, device=device), int(row_A.sum())
    source_XD[live:] = torch.nan
    source_XD.requires_grad_()
    line_M = torch.arange(many, device=device)
    plan = Plan(line_M, line_M.where(line_M < live, -1)[:, None], row_A, row_A.cumsum(0).to(torch.int32), SwiGLU())
    result_MD = through(source_XD, stack, plan)
    got = torch.autograd.grad(result_MD[:live].square().sum(), [source_XD, stack.up, stack.down])
    with torch.no_grad():
        short = through(source_XD[:live].contiguous(), stack, plan._replace(index_M=line_M[:live]))
    assert torch.equal(result_MD[:live], short)
    assert all(grad.isfinite().all() for grad in got)
    assert not got[0][live:].any()
    rows, share = Rows(source_XD.detach(), None), Share(plan.end_A, many)
    h_MF = torch.randn(many, 48, device=device)
    pulled = launch.gated_back(rows, stack, share, h_MF, torch.ones(many, device=device))
    assert pulled.dot_M is not None
    assert pulled.dot_M.isfinite().all()
    assert not pulled.dot_M[live:].any()


def test_tiles_of_few_rows_suffice_wherever_they_lie(device: torch.device) -> None:
    """As many tiles as there can be, each a row of its own expert, behind experts that have none; two blocks wide."""
    stack, rows = Experts(8, 40, range(20), device=device).stack(), torch.randn(15, 8, device=device)
    end_A = torch.arange(-4, 16, device=device).clamp(min=0).to(torch.int32)
    result_MD = launch.times(Rows(rows, None), stack.up, None, Share(end_A, 15), None)
    torch.testing.assert_close(result_MD, torch.einsum("md,mfd->mf", rows, stack.up[5:]), rtol=1e-5, atol=1e-5)


def test_an_expert_without_rows_has_a_gradient_of_zeros_wherever_it_is_written(device: torch.device) -> None:
    row_XD = torch.randn(3, 8, device=device)
    end_A = torch.tensor([0, 3, 3], dtype=torch.int32, device=device)
    out = torch.full((3, 8, 8), torch.nan, device=device)
    launch.outer(Rows(row_XD, None), Rows(row_XD, None), Share(end_A, 3), out)
    assert not out[[0, 2]].any()
    torch.testing.assert_close(out[1], row_XD.T @ row_XD)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_rows_are_added_in_fp32_in_the_order_of_k_and_rounded_once(device: torch.device, weighted: bool) -> None:
    """Another order, or a sum in the type of the rows, would lose the one."""
    places = torch.tensor([[0, 2, 1], [0, 1, 2], [1, 2, 0]], device=device)
    for dtype, large in ((torch.float32, 2.0**24), (torch.bfloat16, 2.0**24), (torch.bfloat16, 2.0**8)):
        row_XD = torch.tensor([[large], [-large], [1.0]], device=device, dtype=dtype)
        weight_TK = torch.ones(3, 3, device=device) if weighted else None
        y_TD = launch.combine(row_XD, places, weight_TK)
        assert y_TD.flatten().tolist() == ([0.0, 1.0, 1.0] if large > 2**23 else [1.0, 1.0, 1.0])


def test_places_are_counted_in_64_bits(device: torch.device) -> None:
    """Of experts, rows and columns that are far apart, no number of 32 bits is the distance."""
    if device.type != "cpu":
        pytest.skip("what a kernel would touch is seen in the interpreter alone")
    kernels: Any = launch._kernels()
    source, weight, out = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    index_M, end_A = torch.arange(16) + 2**28, torch.tensor([0, 0, 16], dtype=torch.int32)
    beyond: set[int] = set()
    with fenced(beyond):
        kernels.times[(1,)](
            source, index_M, weight, None, end_A, out, 3, 1, 2**30, 16, 2**30, 2**29, 1, INDEXED=True, BIASED=False,
            EXPERTS=16, ROWS=16, COLUMNS=32, INNER=16, GROUP=1, WIDE=True,
        )  # fmt: skip
    few, many = range(16), range(32)
    want = {source.data_ptr() + 4 * ((2**28 + m) * 16 + k) for m in few for k in few}
    want |= {weight.data_ptr() + 4 * (2 * 2**30 + n * 2**29 + k) for n in many for k in few}
    want |= {out.data_ptr() + 4 * (m * 2**30 + n) for m in few for n in many}
    assert beyond == want - {out.data_ptr()}
    beyond = set()
    with fenced(beyond):
        kernels.outer[(1, 3)](
            source, index_M, weight, None, end_A, out, 2**15, 2**15, LEFT=True, RIGHT=False, ROWS=16, LEFTS=16,
            RIGHTS=32, WIDE=True,
        )  # fmt: skip
    want = {source.data_ptr() + 4 * ((2**28 + m) * 2**15 + i) for m in few for i in few}
    want |= {weight.data_ptr() + 4 * (m * 2**15 + j) for m in few for j in many}
    want |= {out.data_ptr() + 4 * (e * 2**30 + i * 2**15 + j) for e in range(3) for i in few for j in many}
    assert beyond == want - {weight.data_ptr(), out.data_ptr()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_planned_layer_in_kernels_is_one_process_with_all_experts(world: Worlds, ranks: int) -> None:
    if (reason := kernels_refuse(torch.zeros(1), torch.float32)) is not None:
        pytest.skip(reason)
    for seen in world(ranks).run(_exact, Fused(), torch.float32):
        for name, (worst, found, loans) in seen.items():
            assert found < 1e-5, f"{name}: {worst}"
            assert ranks == 1 or name != "hot" or loans, "nothing was lent"


@pytest.mark.fast
def test_without_triton_fused_is_fastest_and_fastest_is_never_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(compute: Fused | Fastest, dtype: torch.dtype) -> list[type]:
        return [type(batch) for batch in compute((2, 1), Experts(4, 4, range(2), dtype=dtype).stack(), SwiGLU(), 0)]

    row_XD, place_TK = torch.randn(5, 4), torch.tensor([[0, 4], [2, 2]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert Tiles not in batches(Fastest(), dtype)
    assert batches(Fused(), torch.float64) == batches(Fastest(), torch.float64)
    monkeypatch.setattr(launch, "_kernels", lambda: None)
    assert kernels_refuse(row_XD, torch.float32) == "Triton is not installed"
    assert batches(Fused(), torch.float32) == batches(Fastest(), torch.float32)
    assert torch.equal(Fused().add(row_XD, place_TK, None), row_XD[place_TK].sum(dim=1))


def test_the_kernels_compile_for_hopper_and_fit_its_shared_memory(tmp_path: Path) -> None:
    """In a process without the interpreter, for a GPU that need not be there."""
    if (reason := kernels_refuse(torch.zeros(1), torch.float32)) is not None:
        pytest.skip(reason)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).parent / "for_hopper.py")]  # not as part of this package, which asks
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
