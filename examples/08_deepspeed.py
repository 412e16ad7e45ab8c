"""MoE layers under a DeepSpeed engine, ZeRO-2: trained, balanced without a loss, saved and loaded.

    torchrun --standalone --nproc-per-node 1 examples/08_deepspeed.py     one process
    torchrun --standalone --nproc-per-node 4 examples/08_deepspeed.py     the experts over two ranks, twice

Both print the same losses. `pip install 'evenmoe[deepspeed]'` first. DS_ACCELERATOR=cpu keeps it off GPUs.
"""

from __future__ import annotations

import tempfile

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import MoE, MoEConfig
from moe.comm import Group
from moe.integrations.deepspeed import expert_group, initialize
from routing import LeastLoaded, LossFree, Sigmoid

DIM, BATCH = 16, 64
CONFIG = MoEConfig(
    dim=DIM, hidden=32, num_experts=8, top_k=2, score=Sigmoid(), balancer=LossFree(step=1e-2),
    assigner=LeastLoaded(headroom=1.05),
)  # fmt: skip
SETTINGS = {
    "train_batch_size": BATCH,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


class Model(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.first, self.moe, self.last = nn.Linear(DIM, DIM), MoE(CONFIG, group), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.moe(torch.tanh(self.first(x))))
        return out


def main() -> None:
    deepspeed.logger.setLevel("ERROR")
    expert_group(1)  # DeepSpeed's communication starts with its first group
    ranks, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    torch.manual_seed(0)
    model = Model(expert_group(min(ranks, 2)))
    engine, *_ = initialize(model=model, config=SETTINGS)

    x = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1)).to(engine.device)
    mine = x.view(2, ranks, -1, DIM)[:, rank]  # two micro-batches
    for step in range(5):
        mean = torch.zeros((), device=engine.device)
        for micro in mine:
            loss = F.mse_loss(engine(micro), micro.flip(-1))
            engine.backward(loss)
            engine.step()  # every second one updates the weights, and settles the prices
            mean += loss.detach() / (2 * ranks)
        deepspeed.comm.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item():.4f}, norm {float(engine.get_global_grad_norm()):.4f}")

    with tempfile.TemporaryDirectory() as own:
        deepspeed.comm.broadcast_object_list(folder := [own], src=0)
        engine.save_checkpoint(folder[0])
        price_E = model.moe.router.price_E.clone()
        model.moe.router.price_E.zero_()
        engine.load_checkpoint(folder[0])
        assert torch.equal(model.moe.router.price_E, price_E)
        deepspeed.comm.barrier()  # before the folder goes, all have read it
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
