"""A routing trace of a small model: what each token chose in each layer.

    python -m scripts.trace -o trace.npz                               # of a model trained for a minute or two
    python -m scripts.trace --from out/bip/rank0of1.pt -o trace.npz    # of one that scripts.train trained

The model learns from the sources of Python's standard library and is recorded on packages it has not seen, one window
for each 1024 bytes, named by the package they belong to. Same seed and machine, same trace.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from moe import MoEConfig
from moe.record import Recorder
from placement import LoadTrace
from routing import Unpriced
from scripts.model import Bytes, Shape
from scripts.text import by_package, split_by_file
from scripts.train import Run, Trainer

SHAPE = Shape(moe=MoEConfig(dim=64, hidden=64, num_experts=16, top_k=2), layers=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--from", dest="checkpoint", type=Path, help="of scripts.train on one process")
    parser.add_argument("--steps", type=int, default=600, help="to train for, without a checkpoint")
    parser.add_argument("--windows", type=int, default=4, help="of each package")
    arguments = parser.parse_args()
    model = trained(arguments.steps) if arguments.checkpoint is None else read(arguments.checkpoint)
    trace = record(model, arguments.windows)
    trace.save(arguments.output)
    print(f"{arguments.output}: {trace.windows} windows, {trace.layers} layers, {trace.num_experts} experts")


def trained(steps: int) -> Bytes:
    trainer = Trainer(Run(shape=SHAPE, steps=steps), None)
    text, _ = split_by_file()
    for _ in track(range(steps), "training"):
        trainer.learn(text)
    return trainer.model


def read(checkpoint: Path) -> Bytes:
    """The model as it generates: at its standing prices, which no later byte moves."""
    state = torch.load(checkpoint, weights_only=False)
    shape: Shape = state["run"].shape
    model = Bytes(replace(shape, moe=replace(shape.moe, balancer=Unpriced(), losses=())))
    model.load_state_dict(state["model"])
    return model


@torch.no_grad()
def record(model: Bytes, windows: int) -> LoadTrace:
    """What every token chose, in evaluation."""
    with Recorder(model.eval()) as recorder:
        for package, text in by_package().items():
            for start in range(0, min(len(text) // 1024, windows) * 1024, 1024):
                model(text[start : start + 1024].view(-1, model.shape.length))
                recorder.end_window(package)
    return recorder.trace()


if __name__ == "__main__":
    main()
