"""A Megatron-Core GPT model whose MoE layers are ours: two expert-parallel ranks under Megatron's DDP, prices settled.

torchrun --standalone --nproc-per-node 2 examples/07_megatron.py

Random weights and a text of our own; `pip install 'evenmoe[megatron]'` first.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from moe import Meters, Recorder, settle_prices
from moe.integrations.megatron import spread_experts
from routing import LeastLoaded, LossFree


def without_cuda() -> None:
    """Megatron takes a few things from CUDA whether there is a GPU or not. With one, none of this is needed."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: nullcontext()  # random numbers of dropout, unused here
    moe_utils.te_general_gemm = None  # 0.16 names it where TransformerEngine is missing


def config() -> TransformerConfig:
    options: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True}
    return TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, moe_ffn_hidden_size=32,
        num_moe_experts=8, moe_router_topk=2, moe_router_pre_softmax=True, moe_router_load_balancing_type="none",
        expert_model_parallel_size=2, add_bias_linear=False, gated_linear_unit=True, activation_func=F.silu, **options,
    )  # fmt: skip


def main() -> None:
    dist.init_process_group("gloo")
    without_cuda()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    torch.manual_seed(0)

    spec = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)
    spec = spread_experts(spec, assigner=LeastLoaded(headroom=1.05), balancer=LossFree(step=0.01))
    model = GPTModel(config(), spec, 97, 24, position_embedding_type="learned_absolute")

    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    everyone = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    text = torch.arange(16 * 24).reshape(16, 24)[dist.get_rank() :: 2] % 97  # something to learn
    where, hidden = torch.arange(24).expand_as(text), torch.ones(24, 24, dtype=torch.bool).triu(1)[None, None]
    meters = Meters(model)
    with Recorder(model) as recorder:
        for step in range(8):
            ddp.zero_grad_buffer()
            (loss := ddp(text, where, hidden, labels=text.roll(-1, 1)).mean()).backward()
            finalize_model_grads([ddp])
            for weight in model.parameters():
                weight.grad = weight.main_grad
            optimiser.step()
            settle_prices(model, everyone)  # every rank of a pipeline stage: tensor, data and context parallel
            recorder.end_window()
            busiest = meters.read(step)["mean"]["max_vio"]
            dist.all_reduce(total := loss.detach())
            if dist.get_rank() == 0:
                print(f"step {step}: loss {total.item() / 2:.4f}, MaxVio {busiest:.2f}")
    assert recorder.trace().load_WLE.shape == (8, 2, 8)  # for `moe-place plan`
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
