"""A Hugging Face model whose experts are spread over ranks: trained, recorded, saved, and read back by transformers.

    python examples/06_hugging_face.py                                        one process
    torchrun --standalone --nproc-per-node 2 examples/06_hugging_face.py     its experts on two

Both print the same losses. The model is a small Qwen3-MoE with random weights; `pip install 'evenmoe[hf]'` first.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe import Recorder, average_expert_grads, clip_grad_norm, leave_experts_alone
from moe.integrations.huggingface import Tally, load_pretrained, parallelize_experts, save_pretrained
from routing import LeastLoaded

CONFIG = Qwen3MoeConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=8,
    num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def main() -> None:
    group = None
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    parallelize_experts(model, group, assigner=LeastLoaded(headroom=1.05))
    trained = DistributedDataParallel(leave_experts_alone(model)) if group else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)

    text = torch.arange(16 * 24).reshape(16, 24) % 97  # something to learn
    mine = text[rank * 16 // ranks : (rank + 1) * 16 // ranks]
    with Recorder(model) as recorder:
        for step in range(5):
            optimiser.zero_grad()
            loss = trained(input_ids=mine, labels=mine).loss
            loss.backward()
            if group:
                average_expert_grads(model, group)
            clip_grad_norm(model, 1.0)
            optimiser.step()
            recorder.end_window(f"step {step}")
            mean = loss.detach()
            if group:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {mean.item() / ranks:.4f}")
    assert recorder.trace().load_WLE.shape == (5, 2, 8)  # for `moe-place plan`

    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        if group:
            dist.broadcast_object_list(folder)
        save_pretrained(model, folder[0])
        tally = Tally()
        again = load_pretrained(folder[0], group, tally=tally)  # this rank's experts alone
        whole = AutoModelForCausalLM.from_pretrained(folder[0])  # transformers reads it as its own
        assert torch.allclose(again(mine).logits, whole(mine).logits, atol=1e-4)
        if group:
            print(f"rank {rank} read {tally.read / tally.held:.0%} of the checkpoint")
            dist.barrier()  # before the folder goes, all have read it
    if group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
