"""Specs of Megatron-Core with our parts in them, what is refused, and the keywords that releases differ in."""

from __future__ import annotations

import warnings
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest

from placement import Placement
from routing import Bip, LeastLoaded

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None, reason="megatron-core is not installed; pip install 'evenmoe[dev]'"
)


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Importing Megatron warns: TransformerEngine and Apex are missing, TorchScript and a module of its own are old."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(Transformer Engine|Apex)")
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="(?s).*custom_layers.transformer_engine", category=DeprecationWarning)
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

        import moe.integrations.megatron  # noqa: F401


def settings(**more: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 8,
    }
    return TransformerConfig(**(options | {"add_bias_linear": False, "cuda_graph_scope": []} | more))


def local_spec() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)


def test_the_moe_layers_of_a_block_are_spread_and_the_others_stay() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from moe.integrations.megatron import CoreMoELayer, spread_experts

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("megatron.core.parallel_state.get_pipeline_model_parallel_rank", lambda: 0)
        block = get_gpt_decoder_block_spec(settings(moe_layer_freq=[0, 1, 1]), use_transformer_engine=False)
    spread = spread_experts(block, assigner=LeastLoaded())
    before, after = ([layer.submodules.mlp.module for layer in spec.layer_specs] for spec in (block, spread))
    assert after[0] is before[0]
    assert after[1:] == [CoreMoELayer, CoreMoELayer]
    assert CoreMoELayer not in before


def test_what_has_no_moe_layer_or_has_ours_already_is_said() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moe.integrations.megatron import spread_experts

    with pytest.raises(ValueError, match="no MoELayer in this ModuleSpec"):
        spread_experts(get_gpt_layer_local_spec())
    with pytest.raises(ValueError, match="a CoreMoELayer already"):
        spread_experts(spread_experts(local_spec()))
    with pytest.raises(ValueError, match="keep_layer=False"):
        spread_experts(local_spec(), keep_layer=True, placement=Placement(expert_RS=[[*range(8)]]))


@pytest.mark.parametrize(
    "option",
    [
        {"moe_shared_expert_overlap": True},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        {"cuda_graph_impl": "local"},
        {"moe_latent_size": 8},
    ],
    ids=str,
)
def test_an_option_that_the_layer_does_not_do_is_named(option: dict[str, Any]) -> None:
    from moe.integrations.megatron import CoreMoELayer

    with pytest.raises(ValueError, match=f"{[*option][-1]}=.*"):
        CoreMoELayer(settings(**option), local_spec().submodules.mlp.submodules)


@pytest.mark.parametrize(
    "option",
    [
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
    ],
    ids=str,
)
def test_two_that_would_balance_are_refused(option: dict[str, Any]) -> None:
    from moe.integrations.megatron import CoreMoELayer

    with pytest.raises(ValueError, match="would both balance"):
        CoreMoELayer(settings(**option), local_spec().submodules.mlp.submodules, balancer=Bip())


def test_a_submodule_is_told_what_its_signature_takes() -> None:
    """0.17 and later say is_mtp_layer, later ones a name; 0.16's classes know neither."""
    from moe.integrations.megatron.versions import build, module_of, submodules_of

    def router_016(config: str, pg_collection: str) -> list[str]:
        return [config, pg_collection]

    def router_019(*, config: str, pg_collection: str, is_mtp_layer: bool, name: str | None = None) -> list[Any]:
        return [config, pg_collection, is_mtp_layer, name]

    said = {"config": "c", "pg_collection": "g", "is_mtp_layer": False, "name": "n"}
    assert build(router_016, **said) == ["c", "g"]
    assert build(partial(router_019, name="bound"), **said) == ["c", "g", False, "n"]
    spec = partial(router_019, submodules="s")  # what a spec is from 0.17 on
    assert module_of(spec) is router_019
    assert submodules_of(spec) == "s"
