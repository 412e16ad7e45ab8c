"""Stock layers of Megatron-Core and DeepSpeed on two ranks, that load what was converted and save what they hold."""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HIDDEN, EXPERTS, RANKS, LAYER = 8, 12, 4, 2, 3
PREFIX = f"decoder.layers.{LAYER}.mlp."


def tokens(rank: int) -> Tensor:
    return torch.randn(6, DIM, generator=torch.Generator().manual_seed(50 + rank))


def megatron(converted: str, saved: str, style: str) -> Tensor:
    """Every rank: its file into a stock MoELayer, strictly; the same layer's state to a file as Megatron writes it.
    -> what the layer makes of this rank's tokens [T, D]"""
    _megatron_on_cpu()
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=RANKS)
    grouped = style == "grouped"
    dtype = torch.bfloat16 if grouped else torch.float32
    config = TransformerConfig(
        num_layers=1, hidden_size=DIM, num_attention_heads=2, ffn_hidden_size=HIDDEN, moe_ffn_hidden_size=HIDDEN,
        moe_shared_expert_intermediate_size=HIDDEN, num_moe_experts=EXPERTS, moe_router_topk=2,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall", moe_grouped_gemm=grouped, moe_use_legacy_grouped_gemm=grouped,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True,
        bias_activation_fusion=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False,
        expert_model_parallel_size=RANKS, hidden_dropout=0.0, bf16=grouped, params_dtype=dtype,
    )  # fmt: skip
    spec = get_moe_module_spec(
        use_te=False, num_experts=EXPERTS, moe_grouped_gemm=grouped, moe_use_legacy_grouped_gemm=grouped
    )
    layer = spec(config=config)
    rank = parallel_state.get_expert_model_parallel_rank()
    name = f"mp_rank_00_{rank:03}/model_optim_rng.pt"
    state = torch.load(Path(converted) / "release" / name)["model"]
    layer.load_state_dict({key.removeprefix(PREFIX): value for key, value in state.items()})
    layer.eval()
    with torch.no_grad():
        out, _ = layer(tokens(rank)[:, None].to(dtype))
    path = Path(saved) / "iter_0000007" / name
    path.parent.mkdir(parents=True)
    content = {PREFIX + key: value for key, value in layer.state_dict().items()}
    torch.save({"model": content, "args": Namespace(tensor_model_parallel_size=1), "iteration": 7}, path)
    (Path(saved) / "latest_checkpointed_iteration.txt").write_text("7")
    if not grouped:
        _distributed(layer, Path(saved).with_name("distributed"))
    return out[:, 0].float()


def _distributed(layer: Any, folder: Path) -> None:
    """In Megatron's distributed format, as the block of like layers that this is one of, and by itself. Its own writer
    starts a process, which a rank of a World may not: torch's writes what Megatron has made of the state."""
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import torch as strategy
    from megatron.core.parallel_state import get_data_parallel_group
    from torch.distributed.checkpoint import FileSystemWriter, save

    group = get_data_parallel_group(with_context_parallel=True)
    ways: tuple[tuple[str, str, Any, bool], ...] = (
        ("alone", PREFIX, (), False),
        ("block", "decoder.layers.mlp.", ((0, 0, 1),), False),
        ("singleton", PREFIX, (), True),
    )
    for name, prefix, offsets, apart in ways:
        metadata = {"dp_cp_group": group, "singleton_local_shards": apart}
        state = layer.sharded_state_dict(prefix, offsets, metadata)
        state, _ = save_preprocess(state)
        state, _, _ = strategy._replace_state_dict_keys_with_sharded_keys(state, True)
        planner = strategy.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        writer = FileSystemWriter(folder / name)
        save(strategy.mcore_to_pyt_state_dict(state, False), storage_writer=writer, planner=planner)


def _megatron_on_cpu() -> None:
    """What Megatron-Core takes from torch.cuda, and from grouped_gemm, which needs a GPU. This process serves nothing
    else."""
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils, token_dispatcher

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.current_stream = MagicMock  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment]
    moe_utils.te_general_gemm = None
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, **options: Any) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else move(tensor, as_numpy=as_numpy, **options)

    token_dispatcher.maybe_move_tensor_to_cpu = moved
    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    grouped_gemm_util.ops = SimpleNamespace(gmm=_gmm)


def _gmm(rows: Tensor, weights: Tensor, counts: Tensor, trans_b: bool) -> Tensor:
    parts = rows.split([int(count) for count in counts])
    return torch.cat([part @ (weight.T if trans_b else weight) for part, weight in zip(parts, weights, strict=True)])


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.up_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def deepspeed(converted: str, saved: str) -> Tensor:
    """Every rank: the checkpoint through an engine into a stock MoE layer, and out of it again. -> as above"""
    rank = torch.distributed.get_rank()
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    import deepspeed as ds
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(
                {str(LAYER): MoE(DIM, FeedForward(), num_experts=EXPERTS, ep_size=RANKS, k=2, use_rts=False,
                                 drop_tokens=False, top2_2nd_expert_sampling=False)}
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[str(LAYER)](x)[0]  # type: ignore[no-any-return]

    net = Net()
    groups = split_params_into_different_moe_groups_for_optimizer([{"params": list(net.parameters()), "name": "all"}])
    options = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    engine, *_ = ds.initialize(model=net, optimizer=torch.optim.SGD(groups, lr=0.1), config=options)
    engine.load_checkpoint(converted, load_module_only=True)
    with torch.no_grad():
        out = engine(tokens(rank))
    engine.save_checkpoint(saved, tag="kept")
    return out  # type: ignore[no-any-return]
