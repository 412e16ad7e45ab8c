"""The one step from tokens to results has the gradients of the literal formula, and keeps little for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe import GELU, Experts, Fastest, Grouped, Loop, Native, ReLU2, SwiGLU
from moe.activation import Activation, linearise
from moe.comm import Peers
from moe.compute import Compute
from moe.dispatch import Dispatch
from moe.guests import Nobody
from placement import RoundRobin, Topology
from routing import AtHome, Choice

pytestmark = pytest.mark.fast
ACTIVATIONS = [SwiGLU(), GELU(), ReLU2()]
BUSY = 17  # a seed of six tokens and three experts
NAMES = [type(activation).__name__ for activation in ACTIVATIONS]


@pytest.fixture(autouse=True)
def _compiled_for_native(request: pytest.FixtureRequest) -> None:
    if "Native" in request.node.name:
        request.getfixturevalue("compiled")


def choose(expert_TK: Tensor, num_experts: int, weight_TK: Tensor, *, as_rows: bool = False) -> Choice:
    """Rows of expert -1 go nowhere. as_rows: do not say that they are K for each token."""
    num_tokens, top_k = expert_TK.shape
    score_TE = torch.zeros(num_tokens, num_experts, device=expert_TK.device)
    return Choice(
        token_N=torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(top_k),
        expert_N=expert_TK.flatten(),
        wanted_N=expert_TK.flatten(),
        weight_N=weight_TK.flatten(),
        score_TE=score_TE,
        logit_TE=score_TE,
        price_E=score_TE.new_zeros(num_experts),
        valid_T=None,
        length=num_tokens,
        top_k=None if as_rows else top_k,
        k=top_k,
    )


def alone(choice: Choice) -> Dispatch:
    """All experts on this process."""
    experts = choice.num_experts
    home = RoundRobin().place(experts, Topology.fitting(num_experts=experts, ranks=1, ranks_per_node=1))
    return Dispatch.of(choice, AtHome()(choice.load_E.cpu().numpy()[None], home), range(experts), Peers.of(None))


def literal(x_TD: Tensor, choice: Choice, experts: Experts) -> Tensor:
    """Autograd's: one matmul an expert, rows gathered, results weighted and added."""
    y_TD = torch.zeros_like(x_TD)
    for slot in range(choice.num_experts):
        (row_N,) = torch.where(choice.expert_N == slot)
        up_bias, down_bias = (None if bias is None else bias[slot] for bias in experts.stack()[2:])
        h_MF = F.linear(x_TD[choice.token_N[row_N]], experts.up[slot], up_bias)
        out_MD = F.linear(experts.activation(h_MF), experts.down[slot], down_bias)
        out_MD = (out_MD * choice.weight_N[row_N, None]).to(x_TD.dtype)
        y_TD = y_TD.index_add(0, choice.token_N[row_N], out_MD)
    return y_TD


def grads(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """y, and the gradient of each leaf that wants one, of a loss that tells all entries of y apart."""
    y_TD = run()
    dy_TD = torch.linspace(-1, 2, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD).sin()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    got = torch.autograd.grad(y_TD, wanted, dy_TD, allow_unused=True) if wanted else ()
    return [y_TD.detach(), *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, got))]


@dataclass(eq=False)
class Case:
    """Tokens, a choice and experts, of one seed. Some rows go nowhere, some weights are zero, some experts get none."""

    experts: Experts
    x_TD: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    as_rows: bool

    @classmethod
    def of(cls, seed: int, compute: Compute, activation: Activation, bias: bool, dtype: torch.dtype) -> Case:
        generator = torch.Generator().manual_seed(seed)
        num_tokens, num_experts = int(torch.randint(0, 9, (), generator=generator)), 1 + seed % 5
        torch.manual_seed(seed)
        experts = Experts(
            8, 16, range(num_experts), activation=activation, bias=bias, compute=compute, dtype=torch.float64
        )
        expert_TK = torch.randint(-1, num_experts, (num_tokens, 3), generator=generator)
        weight_TK = torch.randn(num_tokens, 3, generator=generator, dtype=torch.float64) * (expert_TK >= 0)
        weight_TK *= torch.rand(num_tokens, 3, generator=generator) > 0.2
        x_TD = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(experts.to(dtype), x_TD.to(dtype), weight_TK.to(wide), expert_TK, as_rows=seed % 3 == 0)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.weight_TK, *self.experts.parameters()]

    def choice(self) -> Choice:
        return choose(self.expert_TK, len(self.experts.expert_ids), self.weight_TK, as_rows=self.as_rows)

    def ours(self) -> Tensor:
        choice = self.choice()
        return self.experts(self.x_TD, choice.weight_N, alone(choice), self.experts.stack(), Nobody())

    def literal(self) -> Tensor:
        return literal(self.x_TD, self.choice(), self.experts)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
@pytest.mark.parametrize("compute", [Loop(), Fastest(), Fastest(crossover=9)], ids=str)
@given(seed=st.integers(0, 10**6), bias=st.booleans(), wants=st.integers(0, 63))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_backward_is_autograds_of_the_literal_formula(
    compute: Any, activation: Any, seed: int, bias: bool, wants: int
) -> None:
    """Whichever of x, the weights of the choices and the experts' weights want a gradient."""
    case = Case.of(seed, compute, activation, bias, torch.float64)
    for bit, leaf in enumerate(case.leaves):
        leaf.requires_grad_(bool(wants >> bit & 1))
    for got, want in zip(grads(case.ours, case.leaves), grads(case.literal, case.leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
@given(seed=st.integers(0, 10**6), bias=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_grouped_has_the_gradients_of_the_literal_formula(activation: Any, seed: int, bias: bool) -> None:
    case = Case.of(seed, Grouped(), activation, bias, torch.float32)
    for leaf in case.leaves:
        leaf.requires_grad_()
    for got, want in zip(grads(case.ours, case.leaves), grads(case.literal, case.leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled")
@given(seed=st.integers(0, 10**6), wants=st.integers(0, 15), threads=st.sampled_from([1, 1, 2]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_native_has_the_gradients_of_the_literal_formula(seed: int, wants: int, threads: int) -> None:
    case, before = Case.of(seed, Native(), SwiGLU(), False, torch.float32), torch.get_num_threads()
    for bit, leaf in enumerate(case.leaves):
        leaf.requires_grad_(bool(wants >> bit & 1))
    torch.set_num_threads(threads)
    try:
        seen = grads(case.ours, case.leaves)
    finally:
        torch.set_num_threads(before)
    for got, want in zip(seen, grads(case.literal, case.leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "compute, bias",
    [(Loop(), False), (Loop(), True), (Grouped(), False), (Grouped(), True), (Native(), False)],
    ids=str,
)
def test_bf16_is_no_further_from_exact_than_autograd_in_bf16(compute: Any, bias: bool) -> None:
    """In the mean over all entries, with a tenth to spare for chance."""
    totals = torch.zeros(2)
    for seed in range(20):
        exact = Case.of(seed, Loop(), SwiGLU(), bias, torch.bfloat16)
        exact.experts.double()
        exact.x_TD, exact.weight_TK = exact.x_TD.double(), exact.weight_TK.double()
        rounded = Case.of(seed, compute, SwiGLU(), bias, torch.bfloat16)
        for case in (exact, rounded):
            for leaf in case.leaves:
                leaf.requires_grad_()
        want = grads(exact.literal, exact.leaves)
        for which, run in enumerate((rounded.ours, rounded.literal)):
            got = grads(run, rounded.leaves)
            totals[which] += sum(float((g.double() - w).abs().sum()) for g, w in zip(got, want, strict=True))
    assert totals[0] <= 1.1 * totals[1]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
def test_an_activations_pull_is_the_adjoint_of_its_slope(activation: Any) -> None:
    """<da, slope dh> == <pull da, dh>, the slope by central differences."""
    generator = torch.Generator().manual_seed(0)
    h, dh = (torch.randn(4, 6 * activation.fan, generator=generator, dtype=torch.float64) for _ in range(2))
    a, pull = linearise(activation, h)
    da = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    assert torch.equal(a, activation(h))
    slope = (activation(h + 1e-6 * dh) - activation(h - 1e-6 * dh)) / 2e-6
    torch.testing.assert_close((da * slope).sum(), (pull(da) * dh).sum(), rtol=1e-7, atol=1e-7)


@dataclass(frozen=True, kw_only=True)
class Line:
    """An activation that returns what it is given, the same tensor."""

    fan: int = 1

    def __call__(self, h_MF: Tensor) -> Tensor:
        return h_MF


def test_what_is_kept_survives_backward_even_if_the_activation_returns_it() -> None:
    case = Case.of(BUSY, Loop(), Line(), True, torch.float64)
    for leaf in case.leaves:
        leaf.requires_grad_()
    y_TD = case.ours()
    first = torch.autograd.grad(y_TD.sum(), case.leaves, retain_graph=True)
    second = torch.autograd.grad(y_TD.sum(), case.leaves)
    want = torch.autograd.grad(case.literal().sum(), case.leaves, allow_unused=True)
    for one, two, three in zip(first, second, want):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, torch.zeros_like(one) if three is None else three, rtol=1e-10, atol=1e-10)


def kept_bytes(run: Callable[[], Tensor], given: list[Tensor]) -> int:
    """What autograd keeps, each storage once; `given` are there anyway."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = run()
    del y_TD
    return sum(kept.values())


@pytest.mark.parametrize("compute", [Loop(), Grouped(), Native()], ids=str)
def test_only_what_enters_the_activations_is_kept(compute: Any) -> None:
    """In the proportions of the workload wide-64x8 less than half of what a grouped implementation on autograd keeps:
    rows, h, silu, its product, results and their weighted copy."""
    tokens, top_k, dim, hidden, num_experts = 64, 8, 16, 32, 16
    torch.manual_seed(0)
    experts = Experts(dim, hidden, range(num_experts), compute=compute, dtype=torch.bfloat16)
    x_TD = torch.randn(tokens, dim, dtype=torch.bfloat16, requires_grad=True)
    weight_TK = torch.rand(tokens, top_k, requires_grad=True)
    expert_TK = torch.rand(tokens, num_experts).topk(top_k).indices
    choice = choose(expert_TK, num_experts, weight_TK)
    dispatch, own = alone(choice), experts.stack()
    given = [x_TD, weight_TK, *experts.parameters()]
    rows = tokens * top_k
    h_bytes = rows * 2 * hidden * 2
    assert kept_bytes(lambda: experts(x_TD, choice.weight_N, dispatch, own, Nobody()), given) == h_bytes

    def grouped() -> Tensor:
        end_A = torch.tensor(dispatch.rows_A).cumsum(0).to(torch.int32)
        by_expert = expert_TK.flatten().argsort(stable=True)
        h_MF = F.grouped_mm(x_TD[by_expert // top_k], experts.up.transpose(1, 2), offs=end_A)
        out_MD = F.grouped_mm(experts.activation(h_MF), experts.down.transpose(1, 2), offs=end_A)
        out_MD = out_MD * weight_TK.flatten()[by_expert, None].bfloat16()
        return out_MD[by_expert.argsort()].view(tokens, top_k, dim).sum(1)

    assert kept_bytes(grouped, given) >= 2 * h_bytes
    with torch.no_grad():
        assert kept_bytes(lambda: experts(x_TD, choice.weight_N, dispatch, own, Nobody()), given) == 0


def test_no_gradient_of_a_gradient_is_invented() -> None:
    case = Case.of(BUSY, Loop(), SwiGLU(), False, torch.float64)
    for leaf in case.leaves:
        leaf.requires_grad_()
    (dx_TD,) = torch.autograd.grad(case.ours().square().sum(), [case.x_TD], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx_TD.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_changes_no_gradient(reentrant: bool) -> None:
    case = Case.of(BUSY, Loop(), SwiGLU(), True, torch.float64)
    for leaf in case.leaves:
        leaf.requires_grad_()
    plain = grads(case.ours, case.leaves)

    def run(x_TD: Tensor) -> Tensor:
        case.x_TD = x_TD
        return case.ours()

    x_TD = case.x_TD
    for leaf in case.leaves:
        leaf.grad = None
    y_TD = checkpoint(run, x_TD, use_reentrant=reentrant)
    y_TD.backward(torch.linspace(-1, 2, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD).sin())
    case.x_TD = x_TD
    for leaf, want in zip(case.leaves, plain[1:], strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, want)


def test_under_autocast_matmuls_round_and_gradients_keep_their_type() -> None:
    case = Case.of(BUSY, Fastest(), SwiGLU(), True, torch.float32)
    for leaf in case.leaves:
        leaf.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = grads(case.ours, case.leaves)
    assert seen[0].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in seen[1:])
    for got, want in zip(seen, grads(case.literal, case.leaves), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
