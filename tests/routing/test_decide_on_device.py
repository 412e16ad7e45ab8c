"""The router's decision in one kernel is torch's: in Triton's interpreter on a CPU, as a binary on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe import MoE, MoEConfig
from routing import (
    NOWHERE,
    LossFree,
    Router,
    Sigmoid,
    Tokens,
    TopK,
    Weigh,
    decide_on_device,
    launch,
    python_only,
    token_major,
)
from routing.choice import count_rows
from routing.launch import MOST_EXPERTS, MOST_K, kernel_takes
from routing.top_k import best_experts
from tests.fenced import fenced
from tests.world import KINDS, run

LAW = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
SIZES = st.sampled_from([(1, 1), (2, 1), (7, 7), (8, 2), (40, 6), (64, 8), (130, 3), (60, MOST_K), (300, 17)])


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")
    if launch._kernels() is None:
        pytest.skip("Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cuda":
            yield torch.device("cuda")
            return
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the interpreter was not asked for, since there is a GPU")
        patch.setattr(launch, "DEVICE", "cpu")
        with fenced():
            yield torch.device("cpu")


def scores(seed: int, tokens: int, experts: int, device: torch.device, values: int = 10**9) -> tuple[Tensor, Tensor]:
    """score_TE, whose rows or columns may lie apart in memory, and price_E. Of few values most are equal."""
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randint(-values, values, (tokens, 2 * experts), generator=generator).float() / values
    price_E = torch.randint(-values, values, (2 * experts,), generator=generator).float() / values
    score_TE, price_E = score_TE.to(device), price_E.to(device)
    if seed % 3 == 1:
        return score_TE[:, ::2], price_E[::2]
    score_TE, price_E = score_TE[:, :experts], price_E[:experts]
    return (score_TE.T.contiguous().T if seed % 3 == 2 else score_TE), price_E


def best_in_order(priced_TE: Tensor, top_k: int) -> Tensor:
    """The definition, in Python: NaN first, then the greatest, of equals the lowest expert."""
    rows = [
        sorted(range(len(row)), key=lambda e, row=row: (row[e] == row[e], -row[e] if row[e] == row[e] else 0.0, e))
        for row in priced_TE.tolist()
    ]
    return torch.tensor([row[:top_k] for row in rows], dtype=torch.int64).view(len(rows), top_k)


@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([1, 5, 33, 300]), size=SIZES)
@LAW
def test_without_equals_the_choice_is_torchs(
    device: torch.device, seed: int, tokens: int, size: tuple[int, int]
) -> None:
    (experts, top_k), generator = size, torch.Generator().manual_seed(seed)
    score_TE, price_E = scores(seed, tokens, experts, device)
    own_TE = torch.rand(tokens, experts, generator=generator).argsort(dim=1).to(device)  # a row's numbers all differ
    score_TE = score_TE.copy_(own_TE + 0.25) if seed % 2 else score_TE.copy_(own_TE - 0.25)
    want = (score_TE - price_E).topk(top_k, dim=-1)
    assert kernel_takes(score_TE, price_E, top_k)
    distinct_T = (want.values.diff(dim=1) != 0).all(dim=1) if top_k < experts else torch.ones(tokens, dtype=torch.bool)
    assert distinct_T.float().mean() > 0.9
    got_TK = launch.choose(score_TE, price_E, top_k)
    assert torch.equal(got_TK, best_in_order(score_TE - price_E, top_k).to(device))
    assert torch.equal(got_TK[distinct_T], want.indices[distinct_T])


@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([1, 20]), size=SIZES, values=st.sampled_from([1, 2, 5]))
@LAW
def test_equals_go_to_the_lowest_expert_and_nan_is_the_greatest(
    device: torch.device, seed: int, tokens: int, size: tuple[int, int], values: int
) -> None:
    """Both zeros are equal. Some scores are infinite, as those of groups that are out are."""
    experts, top_k = size
    score_TE, price_E = scores(seed, tokens, experts, device, values)
    luck_TE = torch.rand(score_TE.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    score_TE = score_TE.masked_fill(luck_TE < 0.3, -torch.inf).masked_fill(luck_TE > 0.9, -0.0)
    score_TE = score_TE.masked_fill(luck_TE > 0.95, torch.inf if seed % 2 else torch.nan)
    score_TE = score_TE.masked_fill((luck_TE > 0.97) & (luck_TE < 0.98), -torch.nan)
    price_E = price_E if seed % 2 else price_E * 0.0
    priced_TE = score_TE - price_E
    want_TK = best_in_order(priced_TE, top_k).to(device)
    assert torch.equal(best_experts(score_TE, price_E, top_k, fused=True), want_TK)
    best_TK = priced_TE.topk(top_k, dim=-1).values
    torch.testing.assert_close(priced_TE.gather(1, want_TK), best_TK, rtol=0, atol=0, equal_nan=True)


@given(
    seed=st.integers(0, 10**6),
    tokens=st.sampled_from([0, 1, 33, 100]),
    size=SIZES,
    weigh=st.builds(Weigh, normalize=st.booleans(), scale=st.sampled_from([1.0, 2.5])),
    padded=st.booleans(),
)
@LAW
def test_weights_loads_and_gradients_are_those_of_weigh_and_of_a_count(
    device: torch.device, seed: int, tokens: int, size: tuple[int, int], weigh: Weigh, padded: bool
) -> None:
    experts, top_k = size
    logit_TE, price_E = scores(seed, tokens, experts, device)
    valid_T = torch.arange(tokens, device=device) % 4 != 1 if padded else None
    logit_TE = logit_TE.detach().requires_grad_()
    score_TE = logit_TE.sigmoid()
    if seed % 2:  # neighbours lie apart
        score_TE = torch.stack([score_TE, logit_TE], dim=-1)[..., 0]
    decision = decide_on_device(score_TE, price_E, top_k, valid_T=valid_T, weigh=weigh)
    expert_TK = best_in_order((score_TE - price_E).detach(), top_k).to(device)
    if valid_T is not None:
        expert_TK = expert_TK.where(valid_T[:, None], NOWHERE)
    assert torch.equal(decision.expert_TK, expert_TK)
    rows = token_major(expert_TK)
    assert torch.equal(decision.load_E, count_rows(rows.expert_N, experts))
    assert int(decision.load_E.sum()) == top_k * (tokens if valid_T is None else int(valid_T.sum()))
    weight_TK = weigh(score_TE, rows).view(tokens, top_k)
    torch.testing.assert_close(decision.weight_TK, weight_TK, rtol=1e-6, atol=1e-7)
    direction_TK = torch.linspace(-1, 2, tokens * top_k, device=device).view(tokens, top_k)
    first = [torch.autograd.grad(((w * w + w) * direction_TK).sum(), logit_TE, create_graph=True)[0]
             for w in (decision.weight_TK, weight_TK)]  # fmt: skip
    torch.testing.assert_close(*first, rtol=1e-5, atol=1e-5)
    second = [torch.autograd.grad(grad.square().sum(), logit_TE, retain_graph=True)[0] for grad in first]
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)


def test_a_loss_of_the_scores_and_one_of_the_weights_add_up(device: torch.device) -> None:
    score_TE, price_E = scores(0, 12, 10, device)
    score_TE = score_TE.sigmoid().requires_grad_()
    decision = decide_on_device(score_TE, price_E, 3)
    (decision.weight_TK.sum() + score_TE.square().sum()).backward()
    picked_TE = torch.zeros_like(score_TE).scatter(1, decision.expert_TK, 1.0)
    assert torch.equal(score_TE.grad, (picked_TE + 2 * score_TE).detach())
    assert not decision.expert_TK.requires_grad


@pytest.mark.parametrize("select", [TopK(fused=True), TopK(groups=4, keep=2, worth="top2sum", fused=True)], ids=str)
def test_a_router_decides_and_learns_alike_with_the_kernel(device: torch.device, select: TopK) -> None:
    torch.manual_seed(0)
    router = Router(16, 24, 4, score=Sigmoid(), select=select, balancer=LossFree(step=1e-3)).to(device)
    router.price_E.uniform_(-0.2, 0.2)
    x_TD, valid_T = torch.randn(50, 16, device=device), torch.arange(50, device=device) % 7 > 0
    found = []
    for path in (torch.enable_grad, python_only):
        with path():
            choice = router(x_TD, valid_T)
            (grad,) = torch.autograd.grad(choice.weight_N.square().sum(), router.weight)
        found.append((choice.expert_N, choice.weight_N, choice.load_E, grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_recomputed_with_the_rows_it_had(device: torch.device, kind: str) -> None:
    """And a top-k of the user's own between two layers is not handed the router's."""
    grads = []
    for each in ("none", kind):
        torch.manual_seed(0)
        layer = MoE(MoEConfig(dim=8, hidden=8, num_experts=8, top_k=2, select=TopK(fused=True)), device=device)
        x_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()

        def twice(x_TD: Tensor, layer: MoE = layer) -> Tensor:
            y_TD = layer(x_TD)
            out_TD: Tensor = layer(y_TD * y_TD.topk(2, dim=-1).values.sum(dim=-1, keepdim=True))
            return out_TD

        run(each, twice, x_TD).square().sum().backward()
        grads.append([x_TD.grad, *(parameter.grad for parameter in layer.parameters())])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


def test_whatever_else_comes_is_torchs(device: torch.device) -> None:
    """Other types and sizes, subclasses, modes, traces and transformations."""
    score_TE, price_E = torch.randn(6, 20, device=device), torch.zeros(20, device=device)
    assert kernel_takes(score_TE, price_E, 3)
    assert not kernel_takes(score_TE.bfloat16(), price_E, 3)
    assert not kernel_takes(score_TE, price_E.double(), 3)
    assert not kernel_takes(torch.nn.Parameter(score_TE), price_E, 3)
    assert not kernel_takes(score_TE.to("meta"), price_E, 3)
    assert not kernel_takes(score_TE[:0], price_E, 3)
    assert not kernel_takes(score_TE.repeat(1, 2), price_E.repeat(2), MOST_K + 1)
    assert not kernel_takes(score_TE, price_E[:1], 3)
    wide_TE = torch.zeros(2, MOST_EXPERTS + 1, device=device)
    assert not kernel_takes(wide_TE, wide_TE[0], 1)
    for wide_TE in (score_TE.bfloat16(), score_TE.double()):
        decision = decide_on_device(wide_TE, price_E, 3, valid_T=torch.ones(6, dtype=torch.bool, device=device))
        assert torch.equal(decision.expert_TK, (wide_TE - price_E).topk(3, dim=-1).indices)
        assert torch.equal(decision.weight_TK, wide_TE.gather(1, decision.expert_TK))
        assert torch.equal(decision.load_E, decision.expert_TK.flatten().bincount(minlength=20))
    with python_only():
        assert not kernel_takes(score_TE, price_E, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not kernel_takes(score_TE, price_E, 3)
    want_TK = score_TE.topk(3, dim=-1).indices
    seen: list[bool] = []

    def best(row_TE: Tensor) -> Tensor:
        seen.append(kernel_takes(row_TE, price_E, 3))
        return best_experts(row_TE, price_E, 3, fused=True)

    assert torch.equal(torch.vmap(best)(score_TE[None])[0], want_TK)
    torch.func.grad(lambda row_TE: row_TE.gather(1, best(row_TE)).sum())(score_TE)
    assert seen == [False, False]
    assert torch.equal(
        torch.compile(best_experts, backend="eager", fullgraph=True)(score_TE, price_E, 3, True), want_TK
    )


@pytest.mark.fast
def test_what_does_not_fit_is_refused_and_without_triton_all_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    score_TE, price_E = torch.randn(6, 20), torch.zeros(20)
    with pytest.raises(ValueError, match=r"price_E must be \[20\].*got \[19\]"):
        decide_on_device(score_TE, price_E[1:], 3)
    with pytest.raises(ValueError, match=r"1 <= top_k <= 20.*top_k=21"):
        decide_on_device(score_TE, price_E, 21)
    with pytest.raises(ValueError, match=r"valid_T must be bool and \[6\]; got torch.int64 and \[5\]"):
        decide_on_device(score_TE, price_E, 3, valid_T=torch.ones(5, dtype=torch.int64))
    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "_able", lambda device: False)
    weigh, valid_T = Weigh(normalize=True, scale=2.0), torch.arange(6) != 2
    decision = decide_on_device(score_TE, price_E, 3, valid_T=valid_T, weigh=weigh)
    assert torch.equal(decision.expert_TK, score_TE.topk(3, dim=-1).indices.where(valid_T[:, None], NOWHERE))
    assert torch.equal(decision.weight_TK.flatten(), weigh(score_TE, token_major(decision.expert_TK)))
    assert torch.equal(decision.load_E, decision.expert_TK[valid_T].flatten().bincount(minlength=20))


@pytest.mark.fast
def test_where_the_kernel_cannot_be_built_that_is_told_once_and_torch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "_kernels", object)
    monkeypatch.setattr(launch, "_launch", fail)
    score_TE, price_E = torch.randn(6, 20), torch.zeros(20)
    launch._able.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="torch chooses experts.*Failed to find C compiler"):
            found = [best_experts(score_TE, price_E, 3, fused=True)]
        found.append(best_experts(score_TE, price_E, 3, fused=True))
    finally:
        launch._able.cache_clear()
    assert all(torch.equal(expert_TK, score_TE.topk(3, dim=-1).indices) for expert_TK in found)


@pytest.mark.fast
def test_nobody_gets_the_kernel_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "_able", lambda device: True)
    monkeypatch.setattr(launch, "choose", lambda score_TE, price_E, top_k: asked.append(score_TE) or score_TE)
    score_TE, price_E = torch.randn(6, 20), torch.zeros(20)
    for select in (TopK(), TopK(fused=True)):
        assert not asked
        select(score_TE, price_E, 3, Tokens(None, 6))
    assert asked


def test_the_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """In a process without the interpreter, for a GPU that need not be there."""
    if launch._kernels() is None:
        pytest.skip("Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).parent / "for_hopper.py")]  # not as part of this package, which asks
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
