"""A transformers model whose experts are spread over ranks is the model it was: logits, gradients, what it writes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'evenmoe[hf]'")

from moe import (
    Recorder,
    World,
    average_expert_grads,
    expert_parameters,
    grad_norm,
    leave_experts_alone,
    settle_prices,
)
from moe.comm import Peers, sum_over, world_group
from moe.integrations.huggingface import HostMoE, parallelize_experts, register_experts_implementation
from placement import Placement, Plan
from routing import AtHome, LeastLoaded, LossFree
from tests.moe.integrations.tiny import FAMILIES, SUMS_IN_FP32, checkpointed, host_name, layers_of, make, prompt
from tests.world import relative

Worlds = Callable[[int], World]
LEAST = LeastLoaded(headroom=1.0, min_chunk=1)
ASSIGNERS = {"home": AtHome(), "least": LEAST}


def run(world: Worlds, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """On so many ranks; on one, in this process, which has imported transformers already."""
    return world(ranks).run(function, *args) if ranks > 1 else [function(*args)]


def rank_here() -> int:
    return Peers.of(world_group()).rank


def exact(family: str) -> float:
    return 1e-6 if family in SUMS_IN_FP32 else 1e-9


def batch_of(rank: int) -> Tensor:
    """Ranks have different numbers of tokens, and repeat themselves so that some experts are hot."""
    return prompt(10 + rank, length=5 + 2 * rank).clamp(max=20)


def compare(family: str, assigner: Any, recompute: str = "none") -> tuple[float, int]:
    """The largest relative error of logits and of every gradient of this rank, and how many experts visited."""
    group = world_group()
    reference = make(family)
    model = parallelize_experts(copy.deepcopy(reference), group, assigner=assigner)
    loans: list[int] = []
    for layer in layers_of(model):
        layer.observe(lambda choice, assignment: loans.append(int((assignment.quota_RE > 0).sum())))
    if recompute != "none":
        checkpointed(model, use_reentrant=recompute == "reentrant")
    x = batch_of(rank_here())
    want, got = reference(x, labels=x), model(x, labels=x)
    want.loss.backward()
    got.loss.backward()
    assert len(loans) == len(layers_of(model)), "observers hear of a forward once"
    errors = [relative(got.logits.detach(), want.logits.detach())]
    own = {id(weight) for _, weight in expert_parameters(model)}
    whole = dict(reference.named_parameters())
    ids = {
        f"{name}.experts.{weight}": layer.experts.expert_ids
        for name, layer in model.named_modules()
        if isinstance(layer, HostMoE)
        for weight, _ in layer.experts.named_parameters()
    }
    for name, parameter in model.named_parameters():
        grad = whole[host_name(name)].grad
        if id(parameter) in own:
            grad = torch.zeros_like(whole[host_name(name)]) if grad is None else grad.clone()
            sum_over([grad], Peers.of(group))
            grad = grad[list(ids[name])]
        if grad is not None:
            assert parameter.grad is not None, name
            errors.append(relative(parameter.grad, grad))
    return max(errors), sum(loans)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_one_process(world: Worlds, family: str, ranks: int) -> None:
    for assigner in ASSIGNERS.values():
        errors, loans = zip(*run(world, ranks, compare, family, assigner))
        assert max(errors) < exact(family)
        assert len(set(loans)) == 1


def test_experts_visit_other_ranks_and_come_home(world: Worlds) -> None:
    _, at_home = world(4).run(compare, "mixtral", AtHome())[0]
    _, least = world(4).run(compare, "mixtral", LEAST)[0]
    assert least > at_home, "with loans, more ranks compute an expert than experts have homes"


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_gradient_checkpointing_changes_nothing(world: Worlds, family: str, recompute: str) -> None:
    for error, _ in world(2).run(compare, family, LEAST, recompute):
        assert error < 1e-9


class Noise(nn.Module):
    """A little different in every call, as a kernel that is not deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.calls += 1
        noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(self.calls), dtype=args[0].dtype)
        return (args[0] + 3.0 * noise, *args[1:])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_recomputation_repeats_the_choice_and_weighs_it_anew(family: str, use_reentrant: bool) -> None:
    model = parallelize_experts(make(family), assigner=LEAST)
    checkpointed(model, use_reentrant=use_reentrant)
    layer = layers_of(model)[-1]
    heard: list[Any] = []
    made: list[Any] = []
    layer.observe(lambda choice, assignment: heard.append(choice))
    route = layer._route
    layer._route = lambda *args: made.append(route(*args)) or made[-1]
    block = next(module for module in model.modules() if getattr(module, "experts", None) is layer)
    gate = getattr(block, "gate", None) or block.router
    gate.register_forward_pre_hook(Noise())
    x = prompt(1)
    model(x, labels=x).loss.backward()
    assert len(heard) == 1
    first, second = made
    assert torch.equal(first.expert_N, second.expert_N)
    assert not torch.allclose(first.weight_N, second.weight_N), "the weights are the recomputation's own"
    scores = second.score_TE.gather(1, second.expert_TK)
    fresh = second.score_TE.topk(2, dim=-1).values
    assert not torch.equal(scores, fresh), "the noise would have changed the choice"
    if family != "deepseek_v3":  # which weighs by scores that it does not choose by
        weight_TK = scores.softmax(dim=-1) if family == "gpt_oss" else scores / scores.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(second.weight_N.view_as(weight_TK).to(weight_TK.dtype), weight_TK)


def write(family: str, together: bool) -> bool:
    reference = make(family)
    model = parallelize_experts(copy.deepcopy(reference), world_group(), assigner=LEAST)
    x = prompt(3 if together else rank_here())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    attention = torch.ones_like(x)
    return torch.equal(
        model.generate(x, attention_mask=attention, **options),
        reference.generate(x, attention_mask=attention, **options),
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_generate_writes_what_the_model_would_have_written(world: Worlds, ranks: int) -> None:
    for family in ("mixtral", "deepseek_v3", "gpt_oss"):
        assert all(run(world, ranks, write, family, True))
        assert all(run(world, ranks, write, family, False))


def write_until_the_end() -> tuple[bool, int]:
    reference = make("qwen3_moe")
    model = parallelize_experts(copy.deepcopy(reference), world_group())
    x = prompt(dist.get_rank())[:1]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(x)}
    end = int(reference.generate(x, **options, min_new_tokens=8)[0, x.shape[1] + 1 + 4 * dist.get_rank()])
    want = reference.generate(x, **options, eos_token_id=end)
    got = model.generate(x, **options, eos_token_id=end, synced_gpus=True)
    return torch.equal(got[:, : want.shape[1]], want), want.shape[1]


def test_ranks_whose_texts_end_apart_keep_step(world: Worlds) -> None:
    equal, lengths = zip(*world(2).run(write_until_the_end))
    assert all(equal)
    assert lengths[0] != lengths[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiled_model_is_the_same_model() -> None:
    """Its experts, and the answer to its router, are left out of the graph."""
    reference = make("deepseek_v3")
    model = parallelize_experts(copy.deepcopy(reference))
    x = prompt(0)
    got, want = torch.compile(model, backend="eager")(x, labels=x), reference(x, labels=x)
    got.loss.backward()
    assert relative(got.logits.detach(), want.logits.detach()) < 1e-9
    assert layers_of(model)[0].experts.down_proj.grad is not None


def in_bf16(family: str) -> tuple[float, float]:
    exact, plain = make(family), make(family).to(torch.bfloat16)
    model = parallelize_experts(copy.deepcopy(plain), world_group(), assigner=LEAST)
    x = prompt(rank_here())
    with torch.no_grad():
        want, ours, theirs = (host(x).logits.double() for host in (exact, model, plain))
    return float((ours - want).norm() / want.norm()), float((theirs - want).norm() / want.norm())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe"])
def test_in_bf16_the_error_is_the_models_own(world: Worlds, family: str) -> None:
    ours, theirs = map(max, zip(*world(2).run(in_bf16, family)))
    assert ours <= 1.25 * theirs


def under_ddp(family: str, ep: int) -> float:
    """EP x DP: the mean of the ranks' losses, by DDP and by one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + ep))) for first in range(0, ranks, ep)]
    columns = [dist.new_group(list(range(first, ranks, ep))) for first in range(ep)]
    reference = make(family)
    model = parallelize_experts(copy.deepcopy(reference), groups[rank // ep], assigner=LEAST)
    wrapped = DistributedDataParallel(leave_experts_alone(model))
    for other in range(ranks):
        x = batch_of(other)
        (reference(x, labels=x).loss / ranks).backward()
    x = batch_of(rank)
    wrapped(x, labels=x).loss.backward()
    average_expert_grads(model, world_group(), columns[rank % ep])
    whole = dict(reference.named_parameters())
    errors = [abs(float(grad_norm(model) / grad_norm(reference)) - 1.0)]
    for prefix, layer in model.named_modules():
        if isinstance(layer, HostMoE):
            for name, weight in layer.experts.named_parameters():
                want = whole[f"{prefix}.{name}"].grad[list(layer.experts.expert_ids)]
                errors.append(relative(weight.grad, want))
    errors += [
        relative(weight.grad, whole[name].grad)
        for name, weight in model.named_parameters()
        if name in whole and weight.grad is not None
    ]
    return max(errors)


@pytest.mark.parametrize("ranks, ep", [(2, 2), (4, 2)])
def test_under_ddp_gradients_and_their_norm_are_those_of_the_mean_loss(world: Worlds, ranks: int, ep: int) -> None:
    assert max(world(ranks).run(under_ddp, "qwen3_moe", ep)) < 1e-9


def record(family: str) -> tuple[Any, list[int]]:
    model = parallelize_experts(make(family), world_group())
    seen: list[int] = []
    layers_of(model)[0].observe(lambda choice, assignment: seen.append(assignment.count_RE[rank_here()].tolist()))
    with Recorder(model) as recorder, torch.no_grad():
        for window in range(2):
            model(prompt(window))
            recorder.end_window(f"w{window}")
    return recorder.trace(), seen


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_a_recorder_hears_the_model(world: Worlds, family: str) -> None:
    trace, seen = world(2).run(record, family)[0]
    assert trace.load_WLE.shape == (2, 2, 6)
    assert trace.load_WLE[:, 0].tolist() == seen


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_prices_move_the_choice_and_not_the_weights_of_what_is_chosen(family: str) -> None:
    model = parallelize_experts(make(family), balancer=LossFree(step=0.01)).train()
    layer = layers_of(model)[0]
    choices: list[Any] = []
    layer.observe(lambda choice, assignment: choices.append(choice))
    x = prompt(1)
    model(x)
    busiest = int(choices[0].load_E.argmax())
    settle_prices(model, None)
    assert layer.router.price_E[busiest] > 0
    layer.router.price_E[busiest] = 100.0
    model(x)
    assert choices[1].load_E[busiest] == 0
    if family == "gpt_oss":
        score_TK = choices[1].score_TE.gather(1, choices[1].expert_TK).softmax(dim=-1)
        torch.testing.assert_close(choices[1].weight_N.view_as(score_TK), score_TK)


def test_a_plan_says_where_experts_live() -> None:
    upside_down = Placement(expert_RS=torch.arange(5, -1, -1)[None].numpy())
    model = parallelize_experts(make("mixtral"), placement=Plan(placement_L=(upside_down, upside_down)))
    assert [layer.experts.expert_ids for layer in layers_of(model)] == [(5, 4, 3, 2, 1, 0)] * 2
    x = prompt(0)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, make("mixtral")(x).logits, rtol=0, atol=1e-9)


def test_an_expert_beyond_the_last_is_nowhere_as_for_the_host() -> None:
    model = make("qwen3_moe")
    host = model.model.layers[0].mlp.experts
    x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expert_TK = torch.tensor([[0, 6], [6, 6], [5, 1], [6, 2], [3, 4]])
    weight_TK = torch.rand(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    want = host(x_TD, expert_TK, weight_TK)
    layer = layers_of(parallelize_experts(model))[0]
    heard: list[int] = []
    layer.observe(lambda choice, assignment: heard.append(int(assignment.count_RE.sum())))
    got = layer(x_TD, expert_TK, weight_TK)
    torch.testing.assert_close(got, want)
    assert heard == [6]
    (grad,) = torch.autograd.grad(got.sum(), weight_TK)
    assert (grad[expert_TK == 6] == 0).all()


def test_a_patched_model_draws_the_random_numbers_it_would_have_drawn() -> None:
    model = make("mixtral")
    state = torch.get_rng_state()
    parallelize_experts(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_of_a_model_is_a_model_of_its_own() -> None:
    model = parallelize_experts(make("mixtral"))
    twin = copy.deepcopy(model)
    x = prompt(0)
    with torch.no_grad():
        assert torch.equal(twin(x).logits, model(x).logits)
        layers_of(twin)[0].experts.down_proj.zero_()
        assert not torch.equal(twin(x).logits, model(x).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_compute_is_an_experts_implementation_of_the_host(family: str) -> None:
    model = make(family)
    x = prompt(0)
    want = model(x, labels=x)
    want.loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    model.set_experts_implementation(register_experts_implementation())
    got = model(x, labels=x)
    got.loss.backward()
    assert relative(got.logits.detach(), want.logits.detach()) < exact(family)
    for name, weight in model.named_parameters():
        if grads[name] is not None:
            assert relative(weight.grad, grads[name]) < exact(family), name


class TestUnsupported:
    def test_a_model_without_experts_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"LlamaForCausalLM has no experts; evenmoe spreads .* gpt-oss"):
            parallelize_experts(make("llama"))

    def test_experts_of_another_layout_are_named(self) -> None:
        with pytest.raises(ValueError, match="experts of another layout \\(Llama4TextExperts\\)"):
            parallelize_experts(make("llama4_text"))

    def test_a_model_is_spread_once(self) -> None:
        with pytest.raises(ValueError, match="spread already"):
            parallelize_experts(parallelize_experts(make("mixtral")))

    def test_a_plan_needs_a_line_for_each_block(self) -> None:
        plan = Plan(placement_L=(Placement(expert_RS=torch.arange(6)[None].numpy()),))
        with pytest.raises(ValueError, match="1 layers, the model 2 MoE blocks"):
            parallelize_experts(make("mixtral"), placement=plan)

    def test_what_the_experts_may_not_have_is_named_and_nothing_is_changed(self) -> None:
        model = make("mixtral")
        experts = model.model.layers[1].mlp.experts
        for change, message in (
            (lambda: setattr(experts, "has_post_expert_norm", True), "norms the output"),
            (lambda: setattr(experts, "_is_expert_parallel", True), "transformers' own plan"),
            (lambda: experts.register_buffer("scale", torch.ones(1)), "weights that are not .*: scale"),
            (lambda: setattr(experts, "down_proj", _whole_numbers(experts.down_proj)), r"quantized \(torch.int8\)"),
        ):
            before = copy.deepcopy(experts.__dict__)
            change()
            with pytest.raises(ValueError, match=rf"model.layers.1.mlp.experts \(MixtralExperts\).*{message}"):
                parallelize_experts(model)
            experts.__dict__.update(before)
        parallelize_experts(model)

    def test_a_balancer_needs_a_router_that_chooses_by_top_k(self) -> None:
        model = parallelize_experts(make("phimoe"), balancer=LossFree(step=0.01))
        with pytest.raises(ValueError, match="does not choose by a top-k of 2 over 6"):
            model(prompt(0))


def _whole_numbers(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
