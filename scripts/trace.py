"""A routing trace of a small model, trained for a minute or two: what each token chose in each layer.

    python -m scripts.trace -o examples/toy_trace.npz

The model is a byte-level decoder with MoE layers. It learns from the sources of Python's standard library and is
recorded on files it has not seen, one window for each 1024 bytes, named by the package they belong to. Same seed and
machine, same trace.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import MoE, MoEConfig
from moe.record import Recorder

LAYERS, DIM, HEADS, LENGTH = 4, 64, 4, 128
CONFIG = MoEConfig(dim=DIM, hidden=64, num_experts=16, top_k=2)
PACKAGES = ("json", "email", "asyncio", "unittest", "encodings", "xml")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.moe = MoE(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm_in(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, DIM)
        x = x + self.out(attended)
        y: Tensor = x + self.moe(self.norm_out(x))
        return y


class Bytes(nn.Module):
    """The next byte from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(DIM, 256)

    def forward(self, byte_BT: Tensor) -> Tensor:
        x = self.byte(byte_BT) + self.place.weight[: byte_BT.shape[1]]
        logits: Tensor = self.head(self.blocks(x))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=4, help="of each package")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, unseen = texts()
    model = Bytes()
    learn(model, train, arguments.steps)
    with Recorder(model.eval()) as recorder, torch.no_grad():
        for package, text in unseen.items():
            for start in range(0, min(len(text) // 1024, arguments.windows) * 1024, 1024):
                model(text[start : start + 1024].view(-1, LENGTH))
                recorder.end_window(package)
    trace = recorder.trace()
    trace.save(arguments.output)
    print(f"{arguments.output}: {trace.windows} windows, {trace.layers} layers, {trace.num_experts} experts")


def texts() -> tuple[Tensor, dict[str, Tensor]]:
    """Top-level modules to learn from, packages to record."""
    root = Path(sysconfig.get_path("stdlib"))
    train = b"\n".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    unseen = {name: b"\n".join(path.read_bytes() for path in sorted((root / name).rglob("*.py"))) for name in PACKAGES}
    return _tensor(train), {name: _tensor(text) for name, text in unseen.items()}


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def learn(model: Bytes, text: Tensor, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        start_B = torch.randint(len(text) - LENGTH - 1, (16, 1))
        byte_BT = text[start_B + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(byte_BT[:, :-1]).flatten(0, 1), byte_BT[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if sys.stderr.isatty() or step == steps - 1:
            print(f"\rstep {step + 1}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
